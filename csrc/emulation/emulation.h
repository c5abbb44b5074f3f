// Runs the CUDA kernels on the CPU, line by line: each CUDA thread is a fiber that runs from one meeting of its block
// to the next. csrc/cuda/portable.cuh maps CUDA's words to these. For tests; never in the wheel.
//
// What it finds: blocks whose threads do not all meet, or not at the same place; launches past a device's limits; what
// is read before it was written (shared memory and scratch start as NaN); wrong results under several orders of threads
// and blocks. Under -fsanitize=thread every data race between threads, of a block or of two; under
// -fsanitize=address accesses past shared memory and past each part of the scratch.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

namespace capsroute::emulation {

// Inside a kernel.
int thread_index();
int thread_count();
int block_index();
char* shared_memory();

// A place in the source that can be mutated: a meeting left out, a bound loosened by one.
int barrier_site(const char* file, int line);
int bound_site(const char* file, int line, const char* text);
void barrier(int site);
bool loosened(int site);

void count_load(int64_t bytes);
void count_store(int64_t bytes);

// 16 bytes to shared memory, which come no sooner than the thread waits for them.
void copy_quad(void* to, const void* from);
bool next_copy(void*& to, const void*& from);
inline void wait_copies() {
  struct alignas(16) Quad {
    char bytes[16];
  };
  void* to;
  const void* from;
  while (next_copy(to, from)) *static_cast<Quad*>(to) = *static_cast<const Quad*>(from);
}

// A part of the scratch, which starts as NaN; what surrounds it is nobody's.
void mark_scratch(void* part, int64_t bytes);

using Body = void (*)(const void* arguments);
void run(const char* name, Body body, const void* arguments, int64_t blocks, int threads, int64_t shared,
         const std::string& shape);

template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), int64_t blocks, int threads, int64_t shared, void*,
            const std::string& shape, const Arguments& arguments) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments& arguments;
  } call{kernel, arguments};
  run(
      name,
      [](const void* context) {
        const Call& call = *static_cast<const Call*>(context);
        call.kernel(call.arguments);
      },
      &call, blocks, threads, shared, shape);
}

// Outside: how it runs, and what it counted.
enum class Order { forward, backward, random };
void set_order(Order order);

// The mutated site, as take_sites() names it; empty: none.
void mutate(const std::string& site);
// The sites that were reached since the last call, one a line: "barrier FILE:LINE" or "bound FILE:LINE TEXT".
std::string take_sites();

// One line for each launch since the last call: name, blocks, threads, bytes of shared memory, loaded, stored.
std::string take_launches();

}  // namespace capsroute::emulation
