#include "comm/tuner.h"

#include "cuda/kernels.h"

namespace ringreduce {
namespace {

// Up to here one meeting and p times the arithmetic cost less than two meetings.
constexpr size_t one_shot_bytes = size_t{16} << 10;  // a core per rank
constexpr size_t one_shot_bytes_claimed = size_t{2}
                                          << 10;  // ranks share cores, and do it all in turn

// What the shared memory of one_shot takes, if it was asked for by name; larger messages go by
// two_shot.
constexpr size_t one_shot_largest_bytes = size_t{64} << 10;

// Up to here a rank is done before others, which share its core, have woken up.
constexpr size_t small_bytes = size_t{32} << 10;

}  // namespace

bool Tuner::small(size_t message_bytes) const { return message_bytes <= small_bytes; }

Choice Tuner::choose_on_gpu(Dtype dtype, size_t message_bytes) const {
  const bool fits = message_bytes <= cuda::one_shot_largest_bytes &&
                    size_of(dtype) <= cuda::one_shot_largest_item_bytes;
  switch (wanted_) {
    case Algorithm::automatic:
    case Algorithm::one_shot:
      return {fits ? Algorithm::one_shot : Algorithm::two_shot};
    default:
      return {wanted_};
  }
}

Choice Tuner::choose(Kind kind, size_t message_bytes) const {
  if (kind != Kind::allreduce) {
    return {wanted_ == Algorithm::ring ? Algorithm::ring : Algorithm::two_shot};
  }
  switch (wanted_) {
    case Algorithm::automatic: {
      const size_t limit = claims_ ? one_shot_bytes_claimed : one_shot_bytes;
      return {message_bytes <= limit ? Algorithm::one_shot : Algorithm::two_shot};
    }
    case Algorithm::one_shot:
      return {message_bytes <= one_shot_largest_bytes ? Algorithm::one_shot : Algorithm::two_shot};
    default:
      return {wanted_};
  }
}

}  // namespace ringreduce
