#include "lanczos/krylov_basis.hpp"

#include <algorithm>
#include <string>
#include <utility>

namespace hesd {

KrylovBasis::KrylovBasis(const Kernels& kernels, BasisPanel history, Panel working, const BlockLanczosOptions& options)
    : history_(std::move(history)),
      working_(working),
      working_panel_(kernels, {working}),
      block_(options.block),
      in_place_(options.keeps_whole_basis() && working.rows > 3 * options.block),
      slots_(options.reorthogonalization == Reorthogonalization::none ? 0 : history_.rows() / options.block) {
    require_room(options);
}

void KrylovBasis::require_room(const BlockLanczosOptions& options) const {
    const auto refuse = [](const std::string& what) { throw EngineError("BlockLanczos: " + what); };
    if (working_.rows < 3 * block_ || working_.columns != history_.columns()) {
        refuse("`working` must have at least three times block size rows (it has " + std::to_string(working_.rows) +
               ") and the columns of `history`");
    }
    if (in_place_ && (working_.rows < (options.max_steps + 1) * block_ || history_.rows() > 0)) {
        refuse("`working` with more than three blocks keeps the whole basis: " +
               std::to_string((options.max_steps + 1) * block_) + " rows are needed, and no `history`; got " +
               std::to_string(working_.rows) + " rows and a history of " + std::to_string(history_.rows()));
    }
    if (element_bytes(history_.precision()) > element_bytes(working_.precision)) {
        refuse("`history` has a higher precision than `working`; wanted the same or a lower one");
    }
    if (options.keeps_whole_basis() && !in_place_ && slots_ < options.max_steps - 2) {
        refuse("`history` has " + std::to_string(history_.rows()) + " rows; this mode needs " +
               std::to_string((options.max_steps - 2) * block_));
    }
}

void KrylovBasis::append(std::int64_t width) {
    if (in_place_) {
        ++newest_;
    } else {
        newest_ = 1 - newest_;
        if (recent_blocks_ == 2 && slots_ > 0) {
            history_.store(stored_ % slots_ * block_, newest(block_));
            ++stored_;
        }
        working_panel_.store(newest_row(), work(width));
    }
    recent_blocks_ = 2;
    clear_beyond(width);
}

// Rows beyond a block's width may hold an older block: they must not take part in projections.
void KrylovBasis::clear_beyond(std::int64_t width) const {
    if (width < block_) {
        working_panel_.clear(newest_row() + width, block_ - width);
    }
}

std::int64_t KrylovBasis::history_blocks() const {
    return in_place_ ? std::max<std::int64_t>(newest_ - 1, 0) : std::min(stored_, slots_);
}

BasisRows KrylovBasis::history(BlockRange range) const {
    return {in_place_ ? &working_panel_ : &history_, range.first * block_, (range.last - range.first) * block_};
}

BasisRows KrylovBasis::recent() const {
    const std::int64_t first = in_place_ ? std::max<std::int64_t>(newest_ - 1, 0) : 0;
    return {&working_panel_, first * block_, recent_blocks_ * block_};
}

double KrylovBasis::history_rounding() const {
    return history_.precision() == working_.precision ? 0.0 : 0.5 * machine_epsilon(history_.precision());
}

}  // namespace hesd
