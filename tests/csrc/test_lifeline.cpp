// The lifeline alone, its nodes being threads: what one tells, all others hear, also past a node
// that has left.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>

#include "net/lifeline.h"
#include "ranks.h"

namespace ringreduce {
namespace {

constexpr int nodes = 4, relay = 2;  // the tree: 0 - 2, 2 - 1, 2 - 3

struct Heard {
  std::atomic<int> news{0}, lost{0};
};

void run(int node, const Exchange& exchange, Heard& heard) {
  const auto meet = [&] { exchange(""); };
  const auto wait_for = [](const std::atomic<int>& count, int wanted) {
    while (count.load() < wanted) std::this_thread::yield();
  };
  Lifeline lifeline(node, nodes, true, exchange,
                    {[&](const std::string& message) { heard.news += message == "news"; },
                     [&](int lost) { heard.lost += lost == 7; }, [] {}},
                    Deadline::after_s(20));
  int alarm[2] = {-1, -1};
  require(pipe(alarm) == 0, "no pipe");
  meet();  // from here on nothing is opened
  lifeline.start({alarm[0]});
  close(alarm[1]);
  while (fcntl(alarm[0], F_GETFD) != -1) std::this_thread::yield();  // taken, and once only
  if (node == 1) lifeline.flood("news");
  if (node != 1) wait_for(heard.news, 1);
  meet();
  if (node == relay) lifeline.close();
  meet();
  if (node == 1) {
    lifeline.flood("news");
    lifeline.flood(std::string(1, '\0') + "7");  // as the lifeline says that node 7 is lost
  }
  if (node == 0 || node == 3) {
    wait_for(heard.news, 2);
    wait_for(heard.lost, 1);
  }
  meet();
  require(node != relay || (heard.news == 1 && heard.lost == 0), "events come after close()");
}

}  // namespace
}  // namespace ringreduce

int main() {
  using namespace ringreduce;
  alarm(20);
  for (int repetition = 0; repetition < 20; ++repetition) {
    ThreadExchange exchange(nodes);
    Heard heard[nodes];
    std::vector<std::thread> threads;
    for (int node = 0; node < nodes; ++node) {
      threads.emplace_back([&exchange, &heard, node] {
        size_t round = 0;
        run(
            node,
            [&](const std::string& message) {
              return exchange(static_cast<size_t>(node), round++, message);
            },
            heard[node]);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  std::printf("the lifeline passes on what it is told\n");
}
