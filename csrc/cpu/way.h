// The way of a stream, by rule: what a lane is, whose votes are kept between the passes, and how long a tile is. It
// follows from sizes, dtype and instruction set; the number of threads decides how long a long tile is, which changes
// no bits.
#pragma once

#include "micro.h"
#include "plan.h"
#include "terms.h"

namespace capsroute::CAPSROUTE_ISA {

// The votes of kSamples samples are kept between passes while they take no more than this; else they are made anew.
constexpr int64_t kKeptVotes = int64_t(6) << 20;
// A lane may be a sample where votes, sums and V of L samples and one input capsule stay in the first-level cache: the
// votes may take this. It pays where shuffles of vectors are dear and registers many, which is AVX-512.
constexpr int64_t kNearVotes = int64_t(16) << 10;
constexpr bool kWide = CAPSROUTE_VECTOR_BYTES == 64;
// There one of three ways is taken, the first that fits:
//   votes of L samples are kept, if they take no more than kKeptForTerm for each of the D terms that one is made of;
//   a lane is a feature all the same, and the votes of kSamples are kept, up to kKeptOfTile: if that is at least three
//   quarters of them, the weight, which is read for so few samples then, stays in a third-level cache, and each W_i has
//   numbers enough to be worth shuffles;
//   votes are made anew: without shuffles that is cheaper than to read them from farther away.
constexpr int64_t kKeptForTerm = int64_t(96) << 10, kKeptOfTile = int64_t(7) << 19, kNearWeight = int64_t(12) << 20;
constexpr int64_t kLargeWeight = 512;
// Of a batch of up to kSamples as many are kept as fit into this: all the weight would be read again for these alone.
constexpr int64_t kKeptOfFew = int64_t(12) << 20;
// Where they are made anew, a tile has at most as many samples, between these two numbers, as have V and sums that fit
// into kTileStates.
constexpr int64_t kShortTile = 4 * kSamples, kLongTile = 32 * kSamples, kTileStates = int64_t(4) << 20;

// Whether kernels for vectors of half the width are faster: where rows of O fill these, and would leave one half of the
// last whole one empty. Votes are then read where they are given, unless they are widened. For a weight of each pair
// not where output capsules are so few that a lane had better be a sample; and of a long row less is padding: up to
// three halves, or, where two numbers are a term of whole vectors alone, one.
constexpr int64_t kFewOutputs = 4;

template <class X>
bool half_vectors(const Problem& p) {
  constexpr int64_t half = L<Acc<X>> / 2;
  if (p.O % L<Acc<X>> != half) return false;
  if (p.form == Weight::none) return std::is_same_v<X, Acc<X>>;
  return p.form == Weight::pair && p.J >= kFewOutputs && p.O <= (kTerm<X> == 1 ? 3 : 1) * half;
}

template <class X>
struct Way {
  using A = Acc<X>;

  // A lane is a sample only if it `may` be. Where there is `room` for votes of a few samples, in bytes, they stay there
  // for the backward.
  Way(const Layout<X>& layout, int64_t batch, int64_t passes, bool may, int64_t room, int64_t threads) {
    const bool pair = layout.p.form == Weight::pair, few = batch <= kSamples;
    handed = few && room > 0;
    const bool again = pair && (passes > 1 || handed);
    const bool near = kWide && layout.sums() * L<A> * int64_t(sizeof(A)) <= kNearVotes;
    const Keep rule = again ? rule_of(layout, near) : Keep::none;
    by_samples_ = pair && near && may && batch >= L<A> && rule != Keep::tile;
    product_first = pair && rule == Keep::none;
    together = by_samples() ? L<A> : minimum(kSamples, maximum(1, batch));
    const int64_t block = together * layout.block_size() * int64_t(sizeof(A)), votes = layout.blocks * block;
    int64_t most = rule == Keep::none ? 0 : rule == Keep::tile && near ? kKeptOfTile : votes;
    if (again && few) most = handed ? room : kKeptOfFew;
    kept_inputs = votes <= most ? layout.p.I : most / block * L<A> / kGroup * kGroup;
    keep = kept_inputs > 0;
    run = !by_samples() ? 1 : keep || layout.p.over_inputs ? L<A> : 2;
    tile = tile_size(layout, batch, threads);
  }

  // A lane is a sample, not a feature or an input capsule. For other vectors the compiler leaves it all out.
  bool by_samples() const { return kWide && by_samples_; }

  bool product_first;   // a first pass that couples all alike sums u with W, in one product, and not the votes: where
                        // none are kept. That does not depend on the batch, for its sums have bits of their own
  int64_t together;     // samples whose votes are made together
  int64_t kept_inputs;  // whose votes are kept between the passes: all, or the first ones in whole groups
  bool keep;            // where a lane is a sample these are all or none
  bool handed;          // they are kept in memory that the forward leaves to the backward
  int64_t run;          // where a lane is a sample, input capsules whose votes are summed together
  int64_t tile;         // samples that read the weight together

 private:
  bool by_samples_;

  enum class Keep { none, lanes, tile };  // votes of as many samples as a lane could be, or of a tile of kSamples

  // Whose votes are kept, of a batch that is not few: by sizes alone, as the bits of a first pass depend on it.
  static Keep rule_of(const Layout<X>& layout, bool near) {
    const int64_t votes = layout.blocks * layout.block_size() * int64_t(sizeof(A)), D = layout.p.D;
    if (!near) return kSamples * votes <= kKeptVotes ? Keep::tile : Keep::none;
    if (L<A> * votes <= minimum(kKeptVotes, D * kKeptForTerm)) return Keep::lanes;
    const int64_t numbers = D * layout.sums(), weight = layout.p.I * numbers * int64_t(sizeof(X));
    const bool fits = kSamples * votes <= 4 * kKeptOfTile / 3 && weight <= kNearWeight;
    return fits && numbers >= kLargeWeight ? Keep::tile : Keep::none;
  }

  // As many as give the busiest thread the least to do, which is counted in groups of so many samples. To read the
  // weight of a group is taken to be as long as kSamples samples are; where threads share out the groups of a tile,
  // rather than tiles, each step waits for the last of them, and its sums are added up: taken to be an eighth more.
  int64_t tile_size(const Layout<X>& layout, int64_t batch, int64_t threads) const {
    const int64_t some = by_samples() ? L<A> : kSamples, samples = maximum(1, batch);
    const int64_t longest = longest_tile(layout, some), fewest = divide_up(samples, longest);
    int64_t best = 0, least = 0;
    for (int64_t tiles = fewest; tiles < fewest + 2 * threads; ++tiles) {
      const int64_t tile = divide_up(divide_up(samples, tiles), some) * some;
      const Schedule shared(samples, tile, layout.groups, threads);
      const int64_t items = shared.by_group ? shared.tiles * layout.groups : shared.tiles;
      const int64_t busiest = divide_up(items, threads) * (shared.by_group ? 9 : 8 * layout.groups);
      const int64_t cost = busiest * (tile + kSamples);
      if (best == 0 || cost < least) best = tile, least = cost;
      if (tile == some) break;
    }
    return best;
  }

  // Where votes are kept in the cache, as many samples as they are made of together; else as many as keep V and sums
  // there, so that the weight comes from memory as seldom as can be.
  int64_t longest_tile(const Layout<X>& layout, int64_t some) const {
    if (layout.p.form != Weight::pair || keep) return by_samples() ? 2 * some : some;
    const int64_t most = kTileStates / (2 * layout.outputs() * int64_t(sizeof(A)));
    return minimum(kLongTile, maximum(kShortTile, most / some * some));
  }
};

}  // namespace capsroute::CAPSROUTE_ISA
