// Memory that steps use over and over: getting megabytes anew from the system costs more than what is computed there.
#pragma once

#include <mutex>
#include <utility>
#include <vector>

namespace mla {

class Pool {
  public:
    std::vector<float> take(size_t count) {
        std::vector<float> found;
        {
            std::lock_guard<std::mutex> guard(lock_);
            auto best = free_.end();
            for (auto it = free_.begin(); it != free_.end(); ++it)
                if (best == free_.end() || fits_better(it->size(), best->size(), count)) best = it;
            if (best != free_.end()) {
                found = std::move(*best);
                free_.erase(best);
            }
        }
        if (found.size() < count) {
            found.clear();  // or what it holds would be copied
            found.resize(count);
        }
        return found;
    }

    void give(std::vector<float> memory) {
        std::lock_guard<std::mutex> guard(lock_);
        free_.push_back(std::move(memory));
    }

  private:
    // The smallest that is large enough, else the largest: what a long prompt took does not become the size of all.
    static bool fits_better(size_t one, size_t other, size_t count) {
        if ((one >= count) != (other >= count)) return one >= count;
        return one >= count ? one < other : one > other;
    }

    std::mutex lock_;
    std::vector<std::vector<float>> free_;
};

inline Pool pool;

class Borrowed {
  public:
    explicit Borrowed(size_t count) : memory_(pool.take(count)) {}
    ~Borrowed() { pool.give(std::move(memory_)); }
    float* data() { return memory_.data(); }

  private:
    std::vector<float> memory_;
};

}  // namespace mla
