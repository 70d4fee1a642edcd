// The table of MPI functions, over functions of this file for both kinds of handles; then the fake
// network that stands for MPI in other tests, under random traffic. No MPI is needed.
#include <unistd.h>

#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fake_mpi.h"
#include "net/agreement.h"
#include "net/links.h"
#include "ranks.h"

namespace ringreduce {
namespace {

// ---- The table

/// An MPI that writes down what it is asked, and does as it is told.
struct Script {
  int count = 0, peer = 0, tag = 0;
  const void* data = nullptr;
  bool ends = false, cancelled = false, ends_when_cancelled = true, finalized = false;
  int error = 0;
};
Script script;

template <class Handle>
Handle handle(long number) {
  if constexpr (std::is_pointer_v<Handle>) {
    return reinterpret_cast<Handle>(0x7fff'1234'0000'0000 + number);
  } else {
    return static_cast<Handle>(0x8400'0000u +
                               static_cast<unsigned>(number));  // negative, as MPICH's
  }
}

/// What each handle means; requests are told apart by the script.
enum : long { null_request = 1, communicator, byte_type, request };
constexpr int undefined = -32766;
constexpr size_t status_bytes = 24;

template <class Handle>
struct Functions {
  static void require_handles(Handle type, Handle comm, const Handle* result) {
    require(type == handle<Handle>(byte_type), "another datatype than given");
    require(comm == handle<Handle>(communicator), "another communicator than given");
    require(*result == handle<Handle>(null_request), "a request that is not null");
  }
  static int isend(const void* data, int count, Handle type, int to, int tag, Handle comm,
                   Handle* result) {
    require_handles(type, comm, result);
    script.data = data, script.count = count, script.peer = to, script.tag = tag;
    if (script.error == 0) *result = handle<Handle>(request);
    return script.error;
  }
  static int irecv(void* data, int count, Handle type, int from, int tag, Handle comm,
                   Handle* result) {
    return isend(data, count, type, from, tag, comm, result);
  }
  static int test(Handle* result, int* ended, void* status) {
    require(*result == handle<Handle>(request), "a test of another request");
    if (script.error != 0) return script.error;
    *ended = script.ends || (script.cancelled && script.ends_when_cancelled);
    if (*ended) {
      *result = handle<Handle>(null_request);
      std::memset(status, 0, status_bytes);
      std::memcpy(static_cast<char*>(status) + 8, &script.count, sizeof(int));
    }
    return 0;
  }
  static int get_count(const void* status, Handle type, int* count) {
    require(type == handle<Handle>(byte_type), "another datatype than given");
    std::memcpy(count, static_cast<const char*>(status) + 8, sizeof(int));
    return 0;
  }
  static int cancel(Handle* result) {
    require(*result == handle<Handle>(request), "cancels another request");
    script.cancelled = true;
    return 0;
  }
  static int finalized(int* flag) {
    *flag = script.finalized;
    return 0;
  }
  static int error_string(int code, char* text, int* length) {
    *length = std::snprintf(text, 256, "the reason is %d", code);
    return 0;
  }
};

template <class Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}

template <class Handle>
void* symbol(const std::string& name) {
  using F = Functions<Handle>;
  if (name == "MPI_Isend") return address(&F::isend);
  if (name == "MPI_Irecv") return address(&F::irecv);
  if (name == "MPI_Test") return address(&F::test);
  if (name == "MPI_Get_count") return address(&F::get_count);
  if (name == "MPI_Cancel") return address(&F::cancel);
  if (name == "MPI_Finalized") return address(&F::finalized);
  if (name == "MPI_Error_string") return address(&F::error_string);
  return nullptr;
}

template <class Handle>
MpiLibrary library() {
  const auto bytes_of = [](long number) {
    const Handle value = handle<Handle>(number);
    return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
  };
  return {"MPI.so",
          sizeof(Handle),
          status_bytes,
          bytes_of(communicator),
          bytes_of(byte_type),
          bytes_of(null_request),
          undefined};
}

template <class Handle>
void calls_of_the_table() {
  const std::shared_ptr<Mpi> mpi = make_mpi(library<Handle>(), &symbol<Handle>);
  char data[8];
  Mpi::Request send, receive;
  require(!send && mpi->test(send), "a new request is none");

  script = {};
  mpi->isend(data, 7, 3, 5, send);
  require(send && script.data == data && script.count == 7, "what is sent");
  require(script.peer == 3 && script.tag == 5, "to whom");
  require(!mpi->test(send) && send, "under way");
  script.ends = true;
  require(mpi->test(send) && !send, "ended");

  script = {};
  mpi->irecv(data, Mpi::max_message_bytes, 2, 4, receive);
  require(script.count == 1 << 30, "the longest message");
  script.count = 123;
  script.ends = true;
  size_t received_bytes = 0;
  require(mpi->test(receive, &received_bytes) && received_bytes == 123, "the length received");
  error_of(ErrorCode::invalid, [&] { mpi->isend(data, Mpi::max_message_bytes + 1, 3, 5, send); });
}

template <class Handle>
void errors_and_cancels() {
  const std::shared_ptr<Mpi> mpi = make_mpi(library<Handle>(), &symbol<Handle>);
  char data[8];
  Mpi::Request receive;
  script = {};
  mpi->irecv(data, 8, 2, 4, receive);
  script.error = 15;
  require_in("MPI_Test failed with error 15: the reason is 15",
             error_of(ErrorCode::resource, [&] { mpi->test(receive); }));
  require(!receive, "an operation that failed has ended");
  require_in("MPI_Irecv failed",
             error_of(ErrorCode::resource, [&] { mpi->irecv(data, 8, 2, 4, receive); }));
  require(!receive, "an operation that failed has not begun");

  for (const bool ends : {true, false}) {
    script = {};
    script.ends_when_cancelled = ends;
    mpi->irecv(data, 8, 2, 4, receive);
    require(mpi->cancel(receive) == ends && !receive && script.cancelled, "cancelled");
  }
  script = {};
  mpi->irecv(data, 8, 2, 4, receive);
  script.finalized = true;
  require(mpi->cancel(receive) && !script.cancelled, "nothing is called once MPI has ended");
}

void what_is_missing_is_named() {
  require_in("not loaded: libnowhere.so", error_of(ErrorCode::resource, [] {
               load_mpi({"libnowhere.so", 8, 24, "", "", "", 0});
             }));
  MpiLibrary other = library<void*>();
  other.path = "libc.so.6";  // loaded, but no MPI
  require_in("MPI_Isend is not in the MPI of libc.so.6",
             error_of(ErrorCode::resource, [&] { load_mpi(other); }));
  other.status_bytes = 4096;
  require_in("MPI_Status of 4096", error_of(ErrorCode::resource, [&] { load_mpi(other); }));
  other = library<void*>();
  other.byte_type = "four";
  error_of(ErrorCode::invalid, [&] { make_mpi(other, &symbol<void*>); });
  other.handle_bytes = 4;
  other.communicator = other.null_request = "four";
  make_mpi(other, &symbol<int>);
}

/// An MPI that says nothing of GPUs takes no memory of theirs, and one that says yes need not be
/// asked.
void who_takes_device_memory() {
  static int answer = 0;
  const auto asks = [](const char* name) {
    const auto query = [] { return answer; };
    if (std::string(name) == "MPIX_Query_cuda_support")
      return address(static_cast<int (*)()>(query));
    return symbol<int>(name);
  };
  require(!make_mpi(library<int>(), &symbol<int>)->takes_device_memory, "nobody was asked");
  for (answer = 0; answer < 2; ++answer) {
    require(make_mpi(library<int>(), asks)->takes_device_memory == (answer == 1), "the answer");
  }
  answer = 1;
  MpiLibrary unasked = library<int>();
  unasked.ask_for_cuda = false;
  require(!make_mpi(unasked, asks)->takes_device_memory, "asked against the user's will");
}

// ---- The fake network

constexpr int num_tags = 3, num_messages = 60;

/// Message `number` with a tag between two ranks: its length and its bytes.
std::string message(int from, int to, int tag, int number) {
  std::mt19937 random(static_cast<unsigned>(((from * 16 + to) * num_tags + tag) * 1000 + number));
  std::string text(random() % 4 == 0 ? random() % 50'000 : random() % 64, '\0');
  for (char& byte : text) byte = static_cast<char>(random());
  return text;
}

struct Transfer {
  Mpi::Request request;
  std::string data, expected;
};

/// Every rank sends to every rank, itself included, on all tags.
void traffic_of_rank(Mpi& mpi, int rank, int size) {
  std::vector<Transfer> transfers(static_cast<size_t>(2 * size * num_tags * num_messages));
  auto next = transfers.begin();
  for (int number = 0; number < num_messages; ++number) {
    for (int peer = 0; peer < size; ++peer) {
      for (int tag = 0; tag < num_tags; ++tag) {
        next->data = message(rank, peer, tag, number);
        mpi.isend(next->data.data(), next->data.size(), peer, tag, next->request);
        ++next;
        next->expected = message(peer, rank, tag, number);
        next->data.resize(60'000);
        mpi.irecv(next->data.data(), next->data.size(), peer, tag, next->request);
        ++next;
      }
    }
  }
  for (size_t left = transfers.size(); left > 0;) {
    for (size_t i = 0; i < transfers.size(); ++i) {
      Transfer& transfer = transfers[i];
      size_t received_bytes = 0;
      if (!transfer.request || !mpi.test(transfer.request, &received_bytes)) continue;
      --left;
      if (i % 2 == 0) {
        std::fill(transfer.data.begin(), transfer.data.end(), '!');  // it is ours again
      } else {
        transfer.data.resize(received_bytes);
        require(transfer.data == transfer.expected, "another message than was sent");
      }
    }
    std::this_thread::yield();
  }
}

void traffic(int size, unsigned max_delay_tests) {
  FakeNetwork network({.seed = 7, .max_delay_tests = max_delay_tests, .eager_bytes = 1000});
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back(
        [&network, rank, size] { traffic_of_rank(*network.rank(rank), rank, size); });
  }
  for (std::thread& thread : threads) thread.join();
  require(network.num_pending() == 0, "all has ended");
}

void failures_of_the_network() {
  FakeNetwork network({.seed = 1, .max_delay_tests = 0, .eager_bytes = 4});
  const std::shared_ptr<Mpi> a = network.rank(0), b = network.rank(1);
  char from[8] = "1234567", to[8] = {};
  Mpi::Request send, receive;

  a->isend(from, 8, 1, 0, send);
  require(!a->test(send), "a long send needs its receive");
  b->irecv(to, 4, 0, 0, receive);
  require_in("truncated", error_of(ErrorCode::resource, [&] { b->test(receive); }));
  require(a->test(send), "its send has ended");

  b->irecv(to, 8, 0, 0, receive);
  require(b->cancel(receive) && !receive, "cancelled before it was matched");
  a->isend(from, 8, 1, 0, send);
  b->irecv(to, 8, 0, 0, receive);
  require(!b->cancel(receive) && a->test(send), "too late to cancel");

  network.cut(0);
  b->irecv(to, 8, 0, 0, receive);
  a->isend(from, 8, 1, 0, send);
  for (int i = 0; i < 100; ++i) require(!b->test(receive) && !a->test(send), "cut off");
  network.break_calls_of(1);
  error_of(ErrorCode::resource, [&] { b->test(receive); });
}

/// Knows after so many looks why the wait is in vain; -1: never.
class LateWatch : public Watch {
 public:
  explicit LateWatch(int looks) : looks_(looks) {}
  bool stop() override { return looks_ == 0 || (looks_ > 0 && --looks_ == 0); }

 private:
  int looks_;
};

void what_mpi_refuses_waits_for_the_watch() {
  FakeNetwork network;
  Links links(network.rank(0), {0, 1}, 0, 64, Links::Haste::small_messages);
  LateWatch late(20), never(-1);
  require(links.outgoing({1, 0}, late) != nullptr, "a free slot");
  network.break_calls_of(0);
  require(!links.send({1, 0}, 64, late), "the watch has stopped a send");
  LateWatch also_late(20);
  require(links.incoming({1, 0}, also_late) == nullptr, "the watch has stopped a receive");
  require_in("MPI refused a start",
             error_of(ErrorCode::resource, [&] { links.send({1, 0}, 64, never); }));
}

/// Links are closed by destructors, also where MPI is broken and a message is under way.
void a_broken_mpi_is_left() {
  FakeNetwork network({.seed = 1, .max_delay_tests = 0, .eager_bytes = 4});
  Links links(network.rank(0), {0, 1}, 0, 64, Links::Haste::large_messages);
  LateWatch never(-1);
  require(links.outgoing({1, 0}, never) != nullptr, "a free slot");
  require(links.send({1, 0}, 64, never), "a message that nobody receives");
  network.break_calls_of(0);
  require(!links.close(), "its memory is MPI's");
}

/// What a leader of another version might send.
void messages_of_another_size() {
  for (const size_t bytes : {0u, 8u, 16u, 24u}) {
    FakeNetwork network;
    Agreement agreement(network.rank(0), {0, 1}, 0, 0);
    const std::string message(bytes, '\0');  // digest 0; nothing differs; no payload
    Mpi::Request request;
    network.rank(1)->isend(message.data(), bytes, 0, 0, request);
    LateWatch never(-1);
    const auto meet = [&] { return agreement.meet(0, false, {}, never); };
    if (bytes == 16) {
      require(meet() == Agreement::Verdict::agreed, "a message as it should be");
    } else {
      require_in(std::to_string(bytes) + " bytes", error_of(ErrorCode::resource, meet));
    }
    agreement.close();
  }
}

}  // namespace
}  // namespace ringreduce

#ifdef __SANITIZE_ADDRESS__
/// What a broken MPI may still read is never freed, and that is meant.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() {
  return "leak:ringreduce::Links::find";
}
#endif

int main() {
  using namespace ringreduce;
  alarm(limit_s);
  calls_of_the_table<int>();
  calls_of_the_table<void*>();
  errors_and_cancels<int>();
  errors_and_cancels<void*>();
  what_is_missing_is_named();
  who_takes_device_memory();
  failures_of_the_network();
  what_mpi_refuses_waits_for_the_watch();
  a_broken_mpi_is_left();
  messages_of_another_size();
  for (const unsigned max_delay_tests : {0u, 20u}) {
    for (const int size : {1, 4}) {
      announce("traffic", size);
      traffic(size, max_delay_tests);
    }
  }
}
