// Fibers, of which each is a thread of CUDA's: a stack of its own, switched to and from by hand, and told to the
// sanitizers. For the runtime alone.
#pragma once

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstddef>
#include <stdexcept>
#include <vector>

extern "C" {
// Weak: null where the sanitizer is not linked.
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
void __sanitizer_start_switch_fiber(void**, const void*, size_t) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));
}

namespace capsroute::emulation {

constexpr size_t kStack = 256 * 1024;

inline bool racing() { return __tsan_create_fiber; }

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer = nullptr;  // while another runs
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  int index = 0;
  int waits_at = -1;  // a barrier's site
  int meetings = 0;
  bool done = false;
  std::vector<Copy> copies;
};

inline Fiber new_fiber() {
  Fiber fiber;
  void* pages = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::runtime_error("emulation: no memory for the stacks of fibers");
  fiber.stack = static_cast<char*>(pages);
  if (racing()) fiber.tsan = __tsan_create_fiber(0);
  return fiber;
}

#ifdef __x86_64__
// Saves what a call must keep, and the stack pointer; goes on where `to` was left.
extern "C" void capsroute_switch(void** from, void* to);
asm(R"(
.text
.globl capsroute_switch
.hidden capsroute_switch
.type capsroute_switch, @function
capsroute_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size capsroute_switch, .-capsroute_switch
)");

inline void prepare(Fiber& fiber, void (*entry)()) {
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--top = nullptr;                         // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);  // returned to
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}

inline void switch_stack(Fiber& from, Fiber& to) { capsroute_switch(&from.stack_pointer, to.stack_pointer); }
#else
inline void prepare(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

inline void switch_stack(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

}  // namespace capsroute::emulation
