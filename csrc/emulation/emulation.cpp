// The runtime of the emulation. It is compiled without sanitizers, which are told about fibers by hand: under
// ThreadSanitizer a fiber is a thread, ordered with others by meetings alone.
#include "emulation.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"

namespace capsroute::emulation {
namespace {

// Of the weakest target, sm_75.
constexpr int kMostThreads = 1024;
constexpr int64_t kMostShared = 64 * 1024, kMostBlocks = (int64_t(1) << 31) - 1;

// Under ThreadSanitizer neighbouring blocks run on fibers of their own, as nothing orders blocks: thread t of a block
// is the same fiber again this many blocks later.
constexpr int64_t kBlocksApart = 6;

struct Launch {
  std::string name;
  int64_t blocks, threads, shared, loaded = 0, stored = 0;
};

struct Runtime {
  std::vector<Fiber> all_fibers;  // never freed
  Fiber* fibers = nullptr;        // of the block that runs
  Fiber scheduler;
  Fiber* current = nullptr;
  Body body = nullptr;
  const void* arguments = nullptr;
  int block = 0;
  int threads = 0;
  char* shared = nullptr;
  Order order = Order::forward;
  std::mt19937 random{1};
  std::vector<std::string> sites;
  std::vector<char> reached;  // of each site, whether it was
  std::map<std::string, int> site_numbers;
  std::string mutated_name;
  int mutated = -1;
  std::vector<Launch> launches;
  char start, end;          // what ThreadSanitizer orders by: the launch,
  char* meeting = nullptr;  // and the meetings of a block
};

Runtime& runtime() {
  static Runtime one;
  return one;
}

void switch_to(Fiber& to) {
  Runtime& r = runtime();
  Fiber& from = *r.current;
  r.current = &to;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, to.stack, kStack);
  if (racing()) __tsan_switch_to_fiber(to.tsan, 1);  // 1: this orders nothing
  switch_stack(from, to);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void run_fiber() {
  Runtime& r = runtime();
  Fiber& self = *r.current;
  if (__sanitizer_finish_switch_fiber) {
    const void* stack = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    r.scheduler.stack = const_cast<char*>(static_cast<const char*>(stack));
  }
  if (racing()) __tsan_acquire(&r.start);
  r.body(r.arguments);
  if (racing()) __tsan_release(&r.end);
  self.done = true;
  switch_to(r.scheduler);
}

void in_order(std::vector<int64_t>& order) {
  Runtime& r = runtime();
  std::iota(order.begin(), order.end(), 0);
  if (r.order == Order::backward) std::reverse(order.begin(), order.end());
  if (r.order == Order::random) std::shuffle(order.begin(), order.end(), r.random);
}

// From meeting to meeting until all threads are done.
void run_block(const char* name) {
  Runtime& r = runtime();
  std::vector<int64_t> order(r.threads);
  while (true) {
    in_order(order);
    for (int64_t t : order)
      if (!r.fibers[t].done) switch_to(r.fibers[t]);
    int done = 0, site = -1;
    for (int t = 0; t < r.threads; ++t) {
      const Fiber& fiber = r.fibers[t];
      done += fiber.done;
      if (fiber.done) continue;
      if (site >= 0 && fiber.waits_at != site)
        throw std::runtime_error(std::string("emulation: in kernel ") + name + " threads of a block wait at " +
                                 r.sites[site] + " and at " + r.sites[fiber.waits_at]);
      site = fiber.waits_at;
    }
    if (done == r.threads) return;
    if (done > 0)
      throw std::runtime_error(std::string("emulation: in kernel ") + name +
                               " some threads have ended, others wait at " + r.sites[site]);
  }
}

int site_number(const std::string& name) {
  Runtime& r = runtime();
  const auto [found, is_new] = r.site_numbers.emplace(name, int(r.sites.size()));
  if (is_new) r.sites.push_back(name), r.reached.push_back(false);
  if (name == r.mutated_name) r.mutated = found->second;
  return found->second;
}

std::string place(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

}  // namespace

int thread_index() { return runtime().current->index; }
int thread_count() { return runtime().threads; }
int block_index() { return runtime().block; }
char* shared_memory() { return runtime().shared; }

int barrier_site(const char* file, int line) { return site_number("barrier " + place(file, line)); }
int bound_site(const char* file, int line, const char* text) {
  return site_number("bound " + place(file, line) + " " + text);
}
bool loosened(int site) {
  Runtime& r = runtime();
  r.reached[site] = true;
  return site == r.mutated;
}

void barrier(int site) {
  Runtime& r = runtime();
  r.reached[site] = true;
  if (site == r.mutated) return;
  Fiber& self = *r.current;
  // Two meeting points take turns: a thread may reach the next one before others have left this one.
  char* meeting = &r.meeting[self.meetings++ & 1];
  self.waits_at = site;
  if (racing()) __tsan_release(meeting);
  switch_to(r.scheduler);
  if (racing()) __tsan_acquire(meeting);
}

void count_load(int64_t bytes) { runtime().launches.back().loaded += bytes; }
void count_store(int64_t bytes) { runtime().launches.back().stored += bytes; }

void copy_quad(void* to, const void* from) {
  count_load(16);
  runtime().current->copies.push_back({to, from});
}

bool next_copy(void*& to, const void*& from) {
  std::vector<Copy>& copies = runtime().current->copies;
  if (copies.empty()) return false;
  to = copies.back().to, from = copies.back().from;
  copies.pop_back();
  return true;
}

void mark_scratch(void* part, int64_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(part, size_t(bytes));
  std::memset(part, 0xff, size_t(bytes));
}

void run(const char* name, Body body, const void* arguments, int64_t blocks, int threads, int64_t shared,
         const std::string& shape) {
  static std::mutex one_at_a_time;  // threads of the host may launch at once, as on a GPU
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Runtime& r = runtime();
  if (blocks == 0) return;
  if (blocks > kMostBlocks || threads < 1 || threads > kMostThreads || shared > kMostShared)
    throw std::runtime_error(std::string("emulation: kernel ") + name + " for " + shape + " asks for " +
                             std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads and " +
                             std::to_string(shared) + " bytes of shared memory, more than every device has");
  r.launches.push_back({name, blocks, threads, shared});
  r.body = body, r.arguments = arguments, r.threads = threads;
  const int64_t sets = racing() ? std::min(blocks, kBlocksApart) : 1;
  while (int64_t(r.all_fibers.size()) < sets * threads) r.all_fibers.push_back(new_fiber());
  r.current = &r.scheduler;
  if (racing()) r.scheduler.tsan = __tsan_get_current_fiber();
  std::vector<int64_t> order(blocks);
  in_order(order);
  std::vector<char> meetings(2 * blocks);
  std::vector<void*> memories;
  for (int64_t block : order) {
    r.block = int(block), r.meeting = &meetings[2 * block];
    r.shared = static_cast<char*>(std::aligned_alloc(16, size_t(shared + 15) / 16 * 16));
    std::memset(r.shared, 0xff, size_t(shared));  // NaN
    memories.push_back(r.shared);
    if (racing()) __tsan_release(&r.start);  // the host has prepared it; nothing of an earlier block is told
    r.fibers = &r.all_fibers[block % sets * threads];
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = r.fibers[t];
      fiber.index = t, fiber.done = false, fiber.waits_at = -1, fiber.meetings = 0, fiber.copies.clear();
      prepare(fiber, run_fiber);
    }
    run_block(name);
    if (!racing()) std::free(r.shared), memories.pop_back();
  }
  if (racing()) __tsan_acquire(&r.end);
  for (void* memory : memories) std::free(memory);
}

void set_order(Order order) { runtime().order = order; }

void mutate(const std::string& site) {
  Runtime& r = runtime();
  r.mutated_name = site;
  const auto found = r.site_numbers.find(site);
  r.mutated = found == r.site_numbers.end() ? -1 : found->second;
}

std::string take_sites() {
  Runtime& r = runtime();
  std::string text;
  for (size_t site = 0; site < r.sites.size(); ++site)
    if (r.reached[site]) text += r.sites[site] + "\n";
  r.reached.assign(r.sites.size(), false);
  return text;
}

std::string take_launches() {
  std::string text;
  for (const Launch& x : runtime().launches)
    text += x.name + " " + std::to_string(x.blocks) + " " + std::to_string(x.threads) + " " + std::to_string(x.shared) +
            " " + std::to_string(x.loaded) + " " + std::to_string(x.stored) + "\n";
  runtime().launches.clear();
  return text;
}

}  // namespace capsroute::emulation
