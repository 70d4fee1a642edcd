// Proof of life. One thread per process holds a robust mutex for every communicator; when the
// process dies, however it dies, the kernel marks the mutex before it even frees the memory, and
// peers read the mark with one load: no system call, no polling of processes.
#pragma once

#include <pthread.h>

namespace ringreduce {

/// Makes `mutex` (in shared memory) robust and process-shared, and has this process's life thread
/// lock it.
void hold_for_life(pthread_mutex_t* mutex);

/// The life thread unlocks it: a departure, not a death. The memory may be unmapped afterwards.
void release_life(pthread_mutex_t* mutex);

/// Whether the holder died without releasing. False for a mutex that nobody ever held.
bool died(const pthread_mutex_t* mutex);

}  // namespace ringreduce
