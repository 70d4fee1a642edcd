// What crosses the network: collectives whose parts have owners, on several layouts of hosts,
// results exact, and the bytes that each host sends held against the least that the kind must send.
#include <numeric>

#include "elements.h"

namespace ringreduce {
namespace {

constexpr size_t slack_bytes = 4096;  // of a rank: what leaders agree on, and headers

struct Layout {
  std::vector<std::string> hosts;  // of the ranks

  int size() const { return static_cast<int>(hosts.size()); }
  /// Hosts are named in the order of their first ranks.
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const std::string& host : hosts) {
      if (std::find(names.begin(), names.end(), host) == names.end()) names.push_back(host);
    }
    return names;
  }
  /// The sum over each host's ranks.
  std::vector<size_t> by_host(const std::vector<size_t>& by_rank) const {
    std::vector<size_t> sums;
    for (const std::string& name : names()) {
      sums.push_back(0);
      for (size_t rank = 0; rank < hosts.size(); ++rank) {
        if (hosts[rank] == name) sums.back() += by_rank[rank];
      }
    }
    return sums;
  }
};

/// Rows of an allgather or a reduce_scatter that each rank has.
std::vector<size_t> rows_of(size_t rows, int size) {
  const std::vector<size_t> offsets = split_rows(rows, 1, size);
  std::vector<size_t> each;
  for (size_t rank = 0; rank + 1 < offsets.size(); ++rank) {
    each.push_back(offsets[rank + 1] - offsets[rank]);
  }
  return each;
}

/// In elements, of each host: the least that it has to send, on a ring. `root`: its host.
std::vector<size_t> least(Kind kind, const std::vector<size_t>& owned, size_t root) {
  const size_t hosts = owned.size();
  const size_t all = std::accumulate(owned.begin(), owned.end(), size_t{0});
  std::vector<size_t> elements;
  for (size_t host = 0; host < hosts; ++host) {
    const size_t next = (host + 1) % hosts;
    switch (kind) {
      case Kind::reduce_scatter:
        elements.push_back(all - owned[host]);
        break;
      case Kind::allgather:
        elements.push_back(all - owned[next]);
        break;
      case Kind::reduce:
        elements.push_back(host == root ? 0 : all);
        break;
      case Kind::broadcast:
        elements.push_back(next == root ? 0 : all);
        break;
      default:
        fail("no bound is known");
    }
  }
  return elements;
}

template <class T>
void run_kind(Rank& self, Kind kind, size_t rows, int root) {
  const std::vector<size_t> owned = rows_of(rows, self.size);
  const auto me = static_cast<size_t>(self.rank);
  const size_t begin = std::accumulate(owned.begin(), owned.begin() + self.rank, size_t{0});
  const std::vector<T> whole = input_of<T>(self.rank, rows, 1);
  std::vector<T> output(rows);
  if (kind == Kind::allgather) {
    const std::vector<T> all = input_of<T>(0, rows, 1);
    const auto work = self.run(call_of<T>(kind, all.data() + begin, nullptr, {length(owned[me])}));
    require_equal(reinterpret_cast<const T*>(work->output.get()), all, "allgather");
  } else if (kind == Kind::reduce_scatter) {
    Call call = call_of(kind, whole.data(), output.data(), {length(rows)});
    call.tensors[0].output_layout.shape[0] = length(owned[me]);
    self.run(std::move(call));
    require_equal(output.data(), reduced<T>(Op::sum, self.size, owned[me], 1, begin),
                  "reduce_scatter");
  } else if (kind == Kind::broadcast) {
    output = whole;
    self.run(call_of(kind, output.data(), output.data(), {length(rows)}, Op::sum, root));
    require_equal(output.data(), input_of<T>(root, rows, 1), "broadcast");
  } else {
    T* target = self.rank == root ? output.data() : nullptr;
    self.run(call_of(kind, whole.data(), target, {length(rows)}, Op::sum, root));
    if (target) require_equal(target, reduced<T>(Op::sum, self.size, rows, 1), "reduce");
  }
}

/// 16-bit floats travel as float32 while they are summed up.
template <class T>
void check_traffic(const Layout& layout, Kind kind, size_t rows, int root, size_t sum_bytes) {
  std::vector<size_t> sent(layout.hosts.size());
  run_ranks(
      layout.size(), {},
      [&](Rank& self) {
        self.barrier();
        const size_t before = self.network->bytes_sent(self.rank);
        run_kind<T>(self, kind, rows, root);
        sent[static_cast<size_t>(self.rank)] = self.network->bytes_sent(self.rank) - before;
        self.barrier();
      },
      layout.hosts);
  const std::vector<size_t> owned = layout.by_host(rows_of(rows, layout.size()));
  const std::vector<std::string> names = layout.names();
  const auto root_host =
      std::find(names.begin(), names.end(), layout.hosts[static_cast<size_t>(root)]);
  const std::vector<size_t> bounds =
      least(kind, owned, static_cast<size_t>(root_host - names.begin()));
  const std::vector<size_t> sent_by_host = layout.by_host(sent);
  const bool gathers = kind == Kind::allgather || kind == Kind::broadcast;
  const size_t item_bytes = gathers ? sizeof(T) : sum_bytes;
  const size_t slack = slack_bytes * layout.hosts.size();
  for (size_t host = 0; host < bounds.size(); ++host) {
    const size_t bound = bounds[host] * item_bytes + slack;
    require(sent_by_host[host] <= bound && sent_by_host[host] + 2 * slack >= bound,
            std::string(name_of(kind)) + " on " + std::to_string(layout.size()) + " ranks: host " +
                names[host] + " sends " + std::to_string(sent_by_host[host]) + " bytes, where " +
                std::to_string(bound) + " suffice");
  }
}

void run() {
  const std::vector<Layout> layouts = {{{"a", "b"}},           {{"a", "b", "c"}},
                                       {{"a", "a", "b", "b"}}, {{"a", "b", "a", "b", "c", "c"}},
                                       {{"a", "b", "b"}},      {{"b", "a", "c", "b", "b", "c"}}};
  for (const Layout& layout : layouts) {
    announce("traffic", layout.size());
    for (const Kind kind : {Kind::reduce_scatter, Kind::allgather, Kind::broadcast, Kind::reduce}) {
      const int root = layout.size() - 2;
      check_traffic<float>(layout, kind, 300'007, root, sizeof(float));
      check_traffic<int64_t>(layout, kind, 100'003, root, sizeof(int64_t));
      // An allreduce, whose result travels as 16 bits, may be sooner.
      if (kind != Kind::reduce) check_traffic<bf16>(layout, kind, 120'011, root, sizeof(float));
    }
  }
}

}  // namespace
}  // namespace ringreduce

int main() {
  alarm(ringreduce::limit_s);
  ringreduce::pin_to_two_cores();
  ringreduce::run();
  std::printf("no host sends more than it must\n");
}
