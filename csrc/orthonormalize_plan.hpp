// The small-matrix half of panel_orthonormalize: from Gram matrices to row transforms. Sees no panel.
#pragma once

#include <cstdint>
#include <vector>

#include "hesd/panel_orthonormalize.hpp"

namespace hesd {

class OrthonormalizePlan {
   public:
    OrthonormalizePlan(std::int64_t rows, double tolerance, std::int64_t max_rank);
    // Defined out of line, as everything here: code inlined into a file compiled for one instruction set could
    // otherwise be shared with the others by the linker.
    ~OrthonormalizePlan();
    OrthonormalizePlan(const OrthonormalizePlan&) = delete;
    OrthonormalizePlan& operator=(const OrthonormalizePlan&) = delete;

    // Takes the Gram matrix of the rows as they now are and prepares transform(), to be applied to them. Returns true
    // when the transformed rows are final; otherwise their Gram matrix is wanted next. Throws EngineError
    // on non-finite entries.
    bool next(const double* gram);

    // (rows, rows) row-major: new rows = transform * rows. Rows from the rank on come out as zero.
    [[nodiscard]] const double* transform() const;

    // Writes the factor L (rows, rows) of the contract and returns rank and weakest direction.
    OrthonormalizeResult finish(double* factor) const;

   private:
    std::int64_t rows_;
    double tolerance_;
    std::int64_t max_rank_;
    std::int64_t rounds_ = 0;
    std::int64_t resolved_ = 0;  // leading rows that are already directions of Q
    std::int64_t live_;          // leading rows that are not dropped; those in [resolved_, live_) are residuals
    double weakest_;
    std::vector<double> transform_;
    std::vector<double> factor_;  // original rows = factor * current rows
};

}  // namespace hesd
