// SPDX-License-Identifier: Apache-2.0
// Threads that help if they can. The caller works through a job itself; helpers that wake in time
// take their share, and the caller waits only for those. An OpenMP region, in contrast, ends only
// when every thread has been scheduled, which on a machine with other busy processes (a server has
// several) takes milliseconds. Helpers sleep between jobs, so torch's threads keep their cores.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

namespace diffxkv {

class Pool {
   public:
    // The library's pool. Never destroyed: its threads may outlive static objects.
    static Pool& instance() {
        static Pool* pool = new Pool;
        return *pool;
    }

    // Runs body() on the calling thread and on up to threads - 1 others at the same time; returns
    // when all of them have. Each call of body must take work until none is left. A second caller
    // at the same time, or a forked child, works alone.
    void run(int64_t threads, const std::function<void()>& body) {
        std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
        if (threads <= 1 || !only.owns_lock()) return body();
        {
            std::lock_guard<std::mutex> lock(state_);
            for (; helpers_ < threads - 1; ++helpers_) std::thread([this] { help(); }).detach();
            body_ = &body;
            wanted_ = threads - 1;
        }
        start_.notify_all();
        body();
        std::unique_lock<std::mutex> lock(state_);
        wanted_ = 0;
        done_.wait(lock, [this] { return running_ == 0; });
    }

   private:
    void help() {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            start_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_, ++running_;
            const std::function<void()>& body = *body_;
            lock.unlock();
            body();
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex caller_, state_;
    std::condition_variable start_, done_;
    const std::function<void()>* body_ = nullptr;
    int64_t helpers_ = 0, wanted_ = 0, running_ = 0;
};

}  // namespace diffxkv
