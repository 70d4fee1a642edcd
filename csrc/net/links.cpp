#include "net/links.h"

#include <sched.h>

#include <ctime>

#include "base/deadline.h"
#include "base/error.h"

namespace ringreduce {
namespace {

// A message of a few KB is here within this time if its sender was ready. Waiting for a chunk of a
// large one takes longer, and costs no core (1 Gbit/s, 2 cores: 0.5 ms; a quarter of a core with 20
// us, three quarters with 300 us, at the same speed).
constexpr int64_t small_yield_ns = 300'000, large_yield_ns = 20'000;
// Before that, a small message is looked for without giving the core up (2 hosts of one rank on 2
// cores, 1 KB: 14.2 us in place of 14.6); and first of all without reading the clock, which is as
// much as a look.
constexpr int64_t small_spin_ns = 30'000, large_spin_ns = 0;
constexpr int small_looks = 16, large_looks = 1;
constexpr int64_t look_around_ns = 100'000;
constexpr timespec nap{0, 30'000};
// Within it a rank's end is known on all nodes, and it is well before launchers end the others.
constexpr double news_limit_s = 0.15;

}  // namespace

Links::Links(std::shared_ptr<Mpi> mpi, std::vector<int> ranks, int first_tag, size_t slot_bytes,
             Haste haste, Memory memory)
    : mpi_(std::move(mpi)),
      ranks_(std::move(ranks)),
      first_tag_(first_tag),
      slot_bytes_(slot_bytes),
      looks_(haste == Haste::small_messages ? small_looks : large_looks),
      spin_ns_(haste == Haste::small_messages ? small_spin_ns : large_spin_ns),
      yield_ns_(haste == Haste::small_messages ? small_yield_ns : large_yield_ns),
      memory_(std::move(memory)) {}

Links::~Links() {
  // MPI may still write to or read from memory of requests that did not end: then it is never
  // freed.
  for (std::vector<Link>* links : {&incoming_, &outgoing_}) {
    for (Link& link : *links) {
      for (const Mpi::Request& request : link.requests) {
        if (request && link.memory) static_cast<void>(link.memory.release());
      }
    }
  }
}

Links::Link& Links::find(std::vector<Link>& links, Peer peer) {
  for (Link& link : links) {
    if (link.peer.rank == peer.rank && link.peer.channel == peer.channel) return link;
  }
  const size_t size_bytes = num_slots * slot_bytes_;
  Link link{peer, {nullptr, [](char*) {}}, {}};
  if (memory_) {
    link.memory.reset(memory_(size_bytes));
  } else {
    link.memory = {new char[size_bytes], [](char* memory) { delete[] memory; }};
  }
  links.push_back(std::move(link));
  return links.back();
}

void Links::post(Link& link, uint64_t index) {
  mpi_->irecv(slot(link, index), slot_bytes_, ranks_[static_cast<size_t>(link.peer.rank)],
              first_tag_ + link.peer.channel, link.requests[index % num_slots]);
}

char* Links::outgoing(Peer to, Watch& watch) {
  Link& link = find(outgoing_, to);
  Mpi::Request& request = link.requests[link.moved % num_slots];
  if (request && !wait(request, watch, nullptr)) return nullptr;
  return slot(link, link.moved);
}

/// MPI refuses messages of a rank that has ended, at times before the watch knows of it: then the
/// watch is given the time, since it can tell who that was. False if it has stopped.
template <class Operation>
bool Links::attempt(Watch& watch, Operation operation) {
  try {
    return operation();
  } catch (const Error&) {
    const Deadline limit = Deadline::after_s(news_limit_s);
    while (!watch.stop()) {
      if (limit.passed(now_ns())) throw;
      nanosleep(&nap, nullptr);
    }
    return false;
  }
}

bool Links::send(Peer to, size_t size_bytes, Watch& watch) {
  Link& link = find(outgoing_, to);
  Mpi::Request& request = link.requests[link.moved++ % num_slots];
  return attempt(watch, [&] {
    mpi_->isend(slot(link, link.moved - 1), size_bytes, ranks_[static_cast<size_t>(to.rank)],
                first_tag_ + to.channel, request);
    // Most small messages have left by now. Asked here, and not by flush(), it costs nothing where
    // this rank would only wait for the peer's.
    if (looks_ > 1) mpi_->test(request);
    return true;
  });
}

const char* Links::incoming(Peer from, Watch& watch, size_t* size_bytes) {
  Link& link = find(incoming_, from);
  const bool posted = attempt(watch, [&] {
    for (; link.posted < link.moved + num_slots; ++link.posted) post(link, link.posted);
    return true;
  });
  if (!posted || !wait(link.requests[link.moved % num_slots], watch, size_bytes)) return nullptr;
  return slot(link, link.moved);
}

void Links::release(Peer from) { ++find(incoming_, from).moved; }

bool Links::wait(Mpi::Request& request, Watch& watch, size_t* size_bytes) {
  return attempt(watch, [&] { return look(request, watch, size_bytes); });
}

bool Links::look(Mpi::Request& request, Watch& watch, size_t* size_bytes) {
  for (int look = 0; look < looks_; ++look) {
    if (mpi_->test(request, size_bytes)) return true;
  }
  const int64_t begin_ns = now_ns();
  int64_t looked_ns = begin_ns;
  for (;;) {
    const int64_t now = now_ns();
    if (now - begin_ns >= yield_ns_) {
      nanosleep(&nap, nullptr);
    } else if (now - begin_ns >= spin_ns_) {
      sched_yield();
    }
    if (mpi_->test(request, size_bytes)) return true;
    if (now - looked_ns < look_around_ns) continue;
    looked_ns = now;
    if (watch.stop()) return mpi_->test(request, size_bytes);  // what has come has come
  }
}

bool Links::flush(Watch& watch) {
  for (Link& link : outgoing_) {
    for (Mpi::Request& request : link.requests) {
      if (request && !wait(request, watch, nullptr)) return false;
    }
  }
  return true;
}

bool Links::close() noexcept {
  bool free = true;
  for (Link& link : incoming_) {
    for (Mpi::Request& request : link.requests) {
      // A message that is on its way already is still written there.
      if (mpi_->cancel(request)) continue;
      free = false;
      static_cast<void>(link.memory.release());
    }
  }
  // What was sent has been flushed, unless the communicator was aborted.
  for (Link& link : outgoing_) {
    for (const Mpi::Request& request : link.requests) free = free && !request;
  }
  return free;
}

}  // namespace ringreduce
