// Runs CTAs on a CPU, thread by thread, to test the kernel's logic where there is no GPU: every
// thread is a fiber, and a fiber that waits lets others run. Copies in flight land late and at random
// times. If nobody can go on, that is a hang, and run() says who waits for what.
//
// What it cannot show: speed, what PTX really does, and by itself memory ordering, for a fiber is never
// interrupted; races.h has a sanitizer look at that.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

namespace emulator {

// A thread of execution of its own, with a stack of its own.
//
// Between stacks _setjmp and _longjmp switch: swapcontext also asks the system for the signal mask, twice
// a switch, which is most of what a switch costs. Only the first time takes it.
class Context {
 public:
  // Goes on with `other`, until another goes on with this one.
  void go_to(Context& other) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    swapcontext(&context_, &other.context_);  // the sanitizers know of no other way
#else
    if (_setjmp(point_) != 0) return;
    if (other.has_run_) _longjmp(other.point_, 1);
    other.has_run_ = true;
    setcontext(&other.context_);
#endif
  }

  void begin_at(void (*function)(), char* stack, size_t stack_bytes) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = stack_bytes;
    makecontext(&context_, function, 0);
    has_run_ = false;
  }

 private:
  ucontext_t context_;
  jmp_buf point_;
  bool has_run_ = true;
};

struct Cta;

struct Warp {
  int arrived[2] = {0, 0};   // lanes at an exchange, counted on; even and odd ones
  uint8_t slots[2][32][64];  // what each lane brought
  const char* names[2][32];
};

struct Barrier {
  int arrived = 0;
  int generation = 0;
  bool any = false;  // __syncthreads_or: of this generation
  bool last_any = false;
};

struct Fiber {
  Context context;
  std::shared_ptr<Observed> observed = std::make_shared<Observed>();
  std::unique_ptr<char[]> stack;
  Cta* cta;
  int thread;
  int exchanges = 0;
  std::function<bool()> ready;  // empty: runnable
  const char* waits_for = "";
  bool done = false;
  // cp.async: copies issued and landed, how many were issued at each commit, and who brings those since
  // the last commit or barrier: one for them all, as the sanitizer has only so many threads
  int issued = 0, landed = 0;
  std::shared_ptr<Observed> copier;
  std::vector<int> commits;
  // wgmma: products issued, each with its operand B
  std::vector<std::pair<uint64_t, std::function<void()>>> products;
};

struct Cluster;

struct Cta {
  Cluster* cluster;
  int rank;  // in the cluster
  int block;
  std::vector<uint8_t> memory;
  uint8_t* smem;  // 1024-byte aligned
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  std::vector<Barrier> warpgroups;
  std::vector<uint64_t> warpgroup_brings;  // what the first of a warpgroup brought
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  int threads = 0;  // of all CTAs
  int arrived = 0;
  int exited = 0;
  int generation = 0;

  void check() {
    if (arrived > 0 && arrived + exited == threads) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::deque<std::function<void()>> in_flight;  // copies that land in this order
  Fiber* current = nullptr;
  Context scheduler;
  Observer observer;  // the scheduler
  std::mt19937 random{1};
  int grid = 0;
  int threads = 0;  // a CTA
  std::function<void()> body;
  std::exception_ptr error;  // what a thread threw
};

inline Machine*& machine() {
  static Machine* machine = nullptr;
  return machine;
}
inline Fiber& fiber() { return *machine()->current; }
inline Cta& cta() { return *fiber().cta; }

inline void yield_until(const char* what, std::function<bool()> ready) {
  const Quiet quiet;
  if (ready()) return;
  Fiber& self = fiber();
  self.ready = std::move(ready);
  self.waits_for = what;
  machine()->observer.enter();
  self.context.go_to(machine()->scheduler);
}

// Every lane of the warp brings something and then sees what all brought. Orders no other memory.
template <class T>
std::array<T, 32> exchange(const char* name, const T& mine) {
  static_assert(sizeof(T) <= 64);
  const Quiet quiet;
  Fiber& self = fiber();
  Warp& warp = cta().warps[self.thread / 32];
  const int parity = self.exchanges % 2;
  const int wanted = 32 * (self.exchanges / 2 + 1);
  ++self.exchanges;
  std::memcpy(warp.slots[parity][self.thread % 32], &mine, sizeof(T));
  warp.names[parity][self.thread % 32] = name;
  ++warp.arrived[parity];
  yield_until(name, [&warp, parity, wanted] { return warp.arrived[parity] >= wanted; });
  std::array<T, 32> all;
  for (int lane = 0; lane < 32; ++lane) {
    const char* theirs = warp.names[parity][lane];
    if (theirs != name && std::strcmp(theirs, name) != 0) {
      throw std::logic_error(std::string("a warp has diverged: ") + name + " and " + theirs);
    }
    std::memcpy(&all[lane], warp.slots[parity][lane], sizeof(T));
  }
  return all;
}

inline void arrive(Barrier& barrier, int threads) {
  release(&barrier);
  const Quiet quiet;
  if (++barrier.arrived < threads) return;
  barrier.arrived = 0;
  barrier.last_any = barrier.any;
  barrier.any = false;
  ++barrier.generation;
}

inline void sync(int index, int threads) {
  const Quiet quiet;
  Barrier& barrier = cta().barriers.at(index);
  const int generation = barrier.generation;
  arrive(barrier, threads);
  yield_until(index == 0   ? "__syncthreads"
              : index == 1 ? "barrier 1"
                           : "another barrier",
              [&barrier, generation] { return barrier.generation != generation; });
  acquire(&barrier);
}

// Where the four warps of a warpgroup must all come, with the same value.
inline void meet_warpgroup(const char* name, uint64_t value) {
  const Quiet quiet;
  const int index = fiber().thread / 128;
  Barrier& barrier = cta().warpgroups.at(index);
  uint64_t& brought = cta().warpgroup_brings.at(index);
  if (barrier.arrived == 0) brought = value;
  if (brought != value) throw std::logic_error(std::string("a warpgroup has diverged at ") + name);
  const int generation = barrier.generation;
  if (++barrier.arrived == 128) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  yield_until(name, [&barrier, generation] { return barrier.generation != generation; });
}

// Lands some time later. It comes after what its thread did before; what comes after it, its barrier
// says.
inline void copy_later(std::function<void()> copy,
                       std::shared_ptr<Observed> observed = std::make_shared<Observed>()) {
  const Quiet quiet;
  release(observed.get());
  machine()->in_flight.push_back([observed, copy = std::move(copy)] {
    observed->enter();
    acquire(observed.get());
    copy();
    machine()->observer.enter();
  });
}

inline void fiber_main() {
  try {
    machine()->body();
  } catch (...) {
    machine()->error = std::current_exception();  // it must not leave the fiber
  }
  Fiber& self = fiber();
  release(self.cta->cluster);  // who has left has arrived
  release(&machine());
  {
    const Quiet quiet;
    self.done = true;
    ++self.cta->cluster->exited;
    self.cta->cluster->check();
  }
  machine()->observer.enter();
  self.context.go_to(machine()->scheduler);
}

// Runs `body` on every thread of a grid, cluster after cluster; the CTAs of one run side by side.
inline void run(int grid, int cluster_size, int threads, size_t shared_bytes, int seed,
                const std::function<void()>& body) {
  const Quiet quiet;
  // To the end: the sanitizer gives a thread's number, and so its accesses, to the next one.
  std::vector<std::shared_ptr<Observed>> observed;
  for (int first = 0; first < grid; first += cluster_size) {
    Machine m;
    machine() = &m;
    m.random.seed(seed + first);
    m.grid = grid;
    m.threads = threads;
    m.body = body;
    Cluster cluster;
    cluster.threads = cluster_size * threads;
    for (int rank = 0; rank < cluster_size; ++rank) {
      auto cta = std::make_unique<Cta>();
      cta->cluster = &cluster;
      cta->rank = rank;
      cta->block = first + rank;
      // What was there before is anything: NaN as fp16, bf16 and fp32.
      cta->memory.assign(shared_bytes + 1024, 0xff);
      cta->smem =
          cta->memory.data() + 1024 - reinterpret_cast<uintptr_t>(cta->memory.data()) % 1024;
      cta->warps.resize(threads / 32);
      cta->warpgroups.resize(threads / 128);
      cta->warpgroup_brings.resize(threads / 128);
      for (int thread = 0; thread < threads; ++thread) {
        constexpr size_t kStackBytes = 65536;
        auto f = std::make_unique<Fiber>();
        f->stack = std::unique_ptr<char[]>(new char[kStackBytes]);
        f->cta = cta.get();
        f->thread = thread;
        f->context.begin_at(fiber_main, f->stack.get(), kStackBytes);
        observed.push_back(f->observed);
        m.fibers.push_back(std::move(f));
      }
      cluster.ctas.push_back(std::move(cta));
    }
    int left = cluster_size * threads;
    // Warps take turns in random order, so that no order of them is relied upon.
    std::vector<int> order(cluster_size * threads / 32);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    while (left > 0) {
      bool went_on = false;
      std::shuffle(order.begin(), order.end(), m.random);
      for (const int warp : order) {
        if (!m.in_flight.empty() && m.random() % 4 == 0) {
          m.in_flight.front()();
          m.in_flight.pop_front();
          went_on = true;
        }
        bool warp_went_on = true;
        while (warp_went_on) {  // as far as this warp gets
          warp_went_on = false;
          for (int lane = 0; lane < 32; ++lane) {
            Fiber& f = *m.fibers[warp * 32 + lane];
            if (f.done || (f.ready && !f.ready())) continue;
            f.ready = nullptr;
            m.current = &f;
            f.observed->enter();
            m.scheduler.go_to(f.context);
            if (m.error) std::rethrow_exception(m.error);
            left -= f.done;
            warp_went_on = went_on = true;
          }
        }
      }
      if (!went_on && m.in_flight.empty()) {
        std::string message = "hang:";
        for (size_t i = 0; i < m.fibers.size(); i += 32) {
          const Fiber& f = *m.fibers[i];
          message += " CTA " + std::to_string(f.cta->block) + " warp " +
                     std::to_string(f.thread / 32) +
                     (f.done ? " done" : std::string(" waits for ") + f.waits_for) + ";";
        }
        throw std::logic_error(message);
      }
      if (!went_on) {
        m.in_flight.front()();
        m.in_flight.pop_front();
      }
    }
    if (!m.in_flight.empty()) throw std::logic_error("a CTA left with copies in flight");
  }
  machine() = nullptr;
  acquire(&machine());  // not before: to the sanitizer, CTAs run side by side
}

// A built-in variable of CUDA, which has its value in the fiber that asks.
template <class Ask>
struct BuiltIn {
  struct {
    operator unsigned() const { return static_cast<unsigned>(Ask{}()); }
  } x;
};

inline constexpr auto ask_thread = [] { return fiber().thread; };
inline constexpr auto ask_block = [] { return cta().block; };
inline constexpr auto ask_threads = [] { return machine()->threads; };
inline constexpr auto ask_grid = [] { return machine()->grid; };

}  // namespace emulator

inline constexpr emulator::BuiltIn<decltype(emulator::ask_thread)> threadIdx{};
inline constexpr emulator::BuiltIn<decltype(emulator::ask_block)> blockIdx{};
inline constexpr emulator::BuiltIn<decltype(emulator::ask_threads)> blockDim{};
inline constexpr emulator::BuiltIn<decltype(emulator::ask_grid)> gridDim{};
