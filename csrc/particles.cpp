// branch_particles and select_candidate (DESIGN sections 3.9 and 5.9): one position of discrete particle Gibbs.
//
//   child v of row i:  weight = base_i + alpha (z_v - m_i)     base_i = log_weight_i + lambda - alpha log1p(R1_i)
//                      logp   = z_v - m_i - log1p(R1_i)
//
//   mass pass   mass.h with beta = alpha: V*itemsize bytes a row. A tile in which children close is looked at once more
//               while it is in the cache: the mass of those that close in float64, and max and mass of the open ones
//   finisher    one thread a group. Everything open is relative to the heaviest open child.
//     candidate   a tile by the float64 masses of what closes, an entry by a scan of that tile, read again
//     heavy       the largest of all tile maxima, again and again; the tile is read again for what is left of it
//     light       points kappa (u + k) on the line of what is left, rows in the order of their prefixes; the tile that
//                 holds a point is read again, and the point moves to the same share of its float64 mass
//
// A light child is drawn with probability (m / T64) T / kappa, where T is the recorded mass of its tile, of float32
// precision, and T64 the float64 one. Its weight is kappa T64 / T, so the product is its mass m, to the last digits: a
// rounded T makes the draw a little less even and nothing wrong.
//
// Bytes: V*itemsize a row once and 32 written a tile; with a stop automaton 2 V more a row; 3 N + 2 tiles again.

#include "mass.h"
#include "state.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace power_kernels {
namespace {

// What the pass over the tiles leaves behind beside TileMass, whose field `moment` holds the largest logit that closes.
// The workspace is only aligned to floats.
struct __attribute__((packed, aligned(4))) OpenMass {
  float max, rest;     // of the open children: sum exp(alpha (z - max)) is 1 + rest
  double closing_sum;  // sum exp(alpha (z - moment)) of those that close
};

double log_add(double a, double b) {
  if (a == b) return a + M_LN2;  // also where both are infinite
  const double gap = a - b;
  return gap > 0 ? a + std::log1p(std::exp(-gap)) : gap <= 0 ? b + std::log1p(std::exp(gap)) : gap;
}

template <class T>
T* data_of(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size()) && t.element_size() == sizeof(T) &&
              (t.numel() <= 1 || t.is_contiguous());
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, name, " has the wrong shape, strides or dtype");
  return static_cast<T*>(t.data_ptr());
}

// Which children close. At `last` all do.
struct Closing {
  int64_t V, tiles;
  std::vector<int64_t> eos;  // those of the vocabulary, ascending
  const int16_t* stop_next = nullptr;
  const int16_t* stop_state = nullptr;  // a row
  int64_t states = 0;

  // The automaton's transitions from row b's state; nullptr without an automaton.
  const int16_t* transitions(int64_t b) const {
    if (!stop_next) return nullptr;
    return stop_next + std::clamp<int64_t>(stop_state[b], 0, states - 1) * V;
  }

  std::pair<const int64_t*, const int64_t*> eos_of_tile(int64_t t) const {
    const int64_t* end = eos.data() + eos.size();
    const int64_t* first = std::lower_bound(eos.data(), end, t * TILE);
    return {first, std::lower_bound(first, end, (t + 1) * TILE)};
  }

  bool in_tile(int64_t b, int64_t t, int64_t n) const {
    const auto [first, end] = eos_of_tile(t);
    if (first != end) return true;
    if (const int16_t* next = transitions(b)) return any_negative(next + t * TILE, n);
    return false;
  }

  // The entries of the tile that close, ascending. Returns how many.
  int list(int64_t b, int64_t t, int64_t n, int16_t* entry) const {
    int count = 0;
    if (const int16_t* next = transitions(b)) {
      constexpr int64_t BLOCK = 64;
      for (int64_t i = 0; i < n; i += BLOCK) {
        const int16_t* block = next + t * TILE + i;
        const int64_t length = std::min(BLOCK, n - i);
        if (!any_negative(block, length)) continue;
        for (int64_t j = 0; j < length; ++j) {  // without a branch, which half of them would surprise
          entry[count] = static_cast<int16_t>(i + j);
          count += block[j] < 0;
        }
      }
    }
    const int from_stops = count;
    for (auto [eos_token, end] = eos_of_tile(t); eos_token != end; ++eos_token) {
      const int16_t own = static_cast<int16_t>(*eos_token - t * TILE);
      if (!std::binary_search(entry, entry + from_stops, own)) entry[count++] = own;
    }
    if (from_stops != 0) std::inplace_merge(entry, entry + from_stops, entry + count);
    return count;
  }

 private:
  static bool any_negative(const int16_t* values, int64_t n) {
    int16_t seen = 0;
    for (int64_t i = 0; i < n; ++i) seen |= values[i];
    return seen < 0;
  }
};

// One tile, read again: the open children's logits in `open`, of TILE entries, -inf for all others; those that close,
// one behind the other, in `closing`, and which entries they are.
struct TileReader {
  alignas(64) float open[TILE];
  alignas(64) float closing[TILE];
  int16_t entry[TILE];
  int closing_count;

  void read(const Logits& logits, const Closing& closes, int64_t b, int64_t t, bool last) {
    const int64_t n = logits.tile_size(t);
    logits.kernels->copy(logits.tile(b, t), n, last ? closing : open);
    if (last) {
      std::fill(open, open + TILE, -INFINITY);
      std::iota(entry, entry + n, int16_t{0});
      closing_count = static_cast<int>(n);
      return;
    }
    closing_count = closes.list(b, t, n, entry);
    std::fill(closing, closing + std::min<int64_t>(TILE, (closing_count / 64 + 1) * 64), -INFINITY);
    for (int i = 0; i < closing_count; ++i) {
      closing[i] = open[entry[i]];
      open[entry[i]] = -INFINITY;
    }
  }

  // The largest logit that closes, and the mass of all that do, relative to it.
  std::pair<float, double> closing_mass(const MassKernels& kernels, double alpha) const {
    const float max = closing_count ? closing[kernels.argmax(closing, closing_count)] : -INFINITY;
    return {max, max > -INFINITY ? kernels.sum(closing, closing_count, alpha, max) : 0.0};
  }
};

void tile_pass(const Logits& logits, const Closing& closes, int64_t b, int64_t t, float alpha, bool last,
               TileReader& reader, TileMass* slot, OpenMass* open) {
  const int64_t n = logits.tile_size(t);
  logits.kernels->mass(logits.row(b), logits.V, t, t + 1, alpha, false, slot - t);
  if (!last && !closes.in_tile(b, t, n)) {
    slot->moment = -INFINITY;
    *open = {slot->max, slot->rb, 0.0};
    return;
  }
  reader.read(logits, closes, b, t, last);
  const auto [closing_max, closing_sum] = reader.closing_mass(*logits.kernels, alpha);
  slot->moment = closing_max;
  *open = {-INFINITY, 0.0f, closing_sum};
  if (last) return;
  static const MassKernels& kernels = mass_kernels(torch::headeronly::ScalarType::Float);
  TileMass rest;
  kernels.mass(reader.open, n, 0, 1, alpha, false, &rest);
  open->max = rest.max;
  open->rest = rest.rb;
}

struct Arguments {
  Logits logits;
  int64_t groups, rows;  // rows of a group: N + 1
  const float* alpha;
  const double* log_weight;
  const int32_t* order;
  const int64_t* reference;
  const bool* last;
  const double* closing_bonus;
  const double* uniform;
  double length_bonus, rho;
  Closing closes;
  double* tally;
  int32_t* parent;
  int64_t* token;
  double* child_log_weight;
  double* logp;
  int32_t* child_order;
  int64_t* candidate;
  double* candidate_logp;
  double* log_threshold;
  int32_t* status;
  const TileMass* slots;
  const OpenMass* open;
};

struct Row {
  bool holds_particle;
  double base, max, log1p_r1;
};

struct Child {
  int64_t row, token;
  double log_weight;
  bool operator==(const Child& other) const { return row == other.row && token == other.token; }
};

// What is left of a tile's open children. mass: relative to the heaviest open child of the group.
struct Rest {
  float max;
  int64_t argmax;  // its entry; -1: not known
  double mass;
};

struct Group {
  const Arguments& a;
  const int64_t g, R, N, tiles;
  const double alpha;
  const bool last;
  double* const tally;
  std::vector<Row> rows;
  std::vector<Rest> rest;         // [R, tiles]
  std::vector<double> row_mass;   // what is left of a row
  std::vector<int64_t> row_tile;  // where its largest logit is
  std::vector<int64_t> place_of;  // of a row, in the lexicographic order
  double top = -INFINITY;         // weight of the heaviest open child
  double log_threshold = -INFINITY;
  bool has_reference;
  Child reference;
  std::vector<Child> heavy, light;
  TileReader reader;
  int64_t in_reader = -1;  // row * tiles + tile, without the heavy children

  Group(const Arguments& arguments, int64_t group)
      : a(arguments),
        g(group),
        R(a.rows),
        N(a.rows - 1),
        tiles(a.logits.tiles),
        alpha(a.alpha[group]),
        last(a.last[group]),
        tally(a.tally + 4 * group),
        rows(R),
        place_of(R),
        has_reference(a.reference[group] >= 0),
        reference{N, a.reference[group], -INFINITY} {
    for (int64_t p = 0; p < R; ++p) place_of[order(p)] = p;
  }

  double& total(Tally column) { return tally[static_cast<int64_t>(column)]; }
  int64_t order(int64_t place) const { return std::clamp<int64_t>(a.order[g * R + place], 0, N); }
  int64_t row_of_logits(int64_t row) const { return g * R + row; }
  const TileMass& slot(int64_t row, int64_t t) const { return a.slots[row_of_logits(row) * tiles + t]; }
  const OpenMass& open(int64_t row, int64_t t) const { return a.open[row_of_logits(row) * tiles + t]; }
  Rest& rest_of(int64_t row, int64_t t) { return rest[row * tiles + t]; }
  double logit(int64_t row, int64_t token) const {
    return a.logits.kernels->logit(a.logits.row(row_of_logits(row)), token);
  }
  double weight(int64_t row, double z) const { return rows[row].base + alpha * (z - rows[row].max); }
  Child child(int64_t row, int64_t token) const { return {row, token, weight(row, logit(row, token))}; }
  double logp(const Child& c) const { return logit(c.row, c.token) - rows[c.row].max - rows[c.row].log1p_r1; }

  void run() {
    if (!combine_rows()) return write({}, {}, NAN);
    const Child kept = close();
    survive();
    write(placed(), kept, log_threshold);
  }

  // Whether all rows are sound.
  bool combine_rows() {
    bool all_sound = true;
    for (int64_t i = 0; i < R; ++i) {
      const double log_weight = a.log_weight[g * R + i];
      Status status = Status::OK_;
      rows[i] = {log_weight != -INFINITY, -INFINITY, -INFINITY, 0.0};
      if (rows[i].holds_particle) {
        const RowMass mass = combine(&slot(i, 0), tiles, alpha, alpha, false);
        status = log_weight < INFINITY ? mass.status : Status::NAN_;
        rows[i].base = log_weight + a.length_bonus - alpha * mass.log1p_r1;
        rows[i].max = mass.max;
        rows[i].log1p_r1 = mass.log1p_r1;
      }
      if (i == N && has_reference && status == Status::OK_ &&
          (!rows[i].holds_particle || reference.token >= a.logits.V || logit(i, reference.token) == -INFINITY))
        status = Status::BAD_TOKEN_;
      a.status[g * R + i] = static_cast<int32_t>(status);
      all_sound &= status == Status::OK_;
    }
    return all_sound;
  }

  // ---- candidates

  struct ClosingTile {
    int64_t row, tile;
    double log_scale, sum;
  };

  // log of the sum of the weights of all children that close, and their masses relative to the heaviest, in `mass`.
  static double closing_weight(const std::vector<ClosingTile>& all, std::vector<double>& mass) {
    double heaviest = -INFINITY, sum = 0;
    for (const ClosingTile& c : all) heaviest = std::max(heaviest, c.log_scale);
    mass.clear();
    for (const ClosingTile& c : all) {
      mass.push_back(c.sum > 0 ? std::exp(c.log_scale - heaviest) * c.sum : 0.0);
      sum += mass.back();
    }
    return sum > 0 ? heaviest + std::log(sum) : -INFINITY;
  }

  // Adds the children that close to the tally. Returns the one that is kept from now on; token -1: the old one is.
  Child close() {
    const Child none{-1, -1, -INFINITY};
    std::vector<ClosingTile> closing;
    std::vector<double> mass;
    for (int64_t i = 0; i < R; ++i)
      for (int64_t t = 0; rows[i].holds_particle && t < tiles; ++t)
        if (slot(i, t).moment > -INFINITY)
          closing.push_back({i, t, weight(i, slot(i, t).moment), open(i, t).closing_sum});
    double weight_sum = closing_weight(closing, mass);
    if (weight_sum == -INFINITY) return none;
    total(Tally::MASS_) = log_add(total(Tally::MASS_), weight_sum);
    int64_t without = -1;  // the token of the reference, which is no candidate of the draw
    if (has_reference && closes(reference.token)) {
      without = reference.token;
      has_reference = false;
      total(Tally::REFERENCE_) = child(N, without).log_weight + a.closing_bonus[g];
      for (ClosingTile& c : closing)
        if (c.row == N && c.tile == without / TILE) {
          const auto [max, sum] = read_closing(c, without);
          c.log_scale = weight(N, max);
          c.sum = sum;
        }
      weight_sum = closing_weight(closing, mass);
      if (weight_sum == -INFINITY) return none;
    }
    const double before = total(Tally::OTHERS_);
    const double after = log_add(before, weight_sum + a.closing_bonus[g]);
    total(Tally::OTHERS_) = after;
    const double old_share = std::exp(before - after), u = a.uniform[2 * g + 1];
    if (u < old_share) return none;
    const Child kept = draw_closing(closing, mass, (u - old_share) / (1.0 - old_share), without);
    total(Tally::KEPT_) = kept.log_weight + a.closing_bonus[g];
    return kept;
  }

  bool closes(int64_t token) const {
    if (last) return true;
    const int64_t b = row_of_logits(N);
    const int16_t* next = a.closes.transitions(b);
    return (next && next[token] < 0) || std::binary_search(a.closes.eos.begin(), a.closes.eos.end(), token);
  }

  // What closes in a tile, but for token `without` of row N, is then in the reader. Returns its maximum and its mass.
  std::pair<float, double> read_closing(const ClosingTile& c, int64_t without) {
    reader.read(a.logits, a.closes, row_of_logits(c.row), c.tile, last);
    for (int i = 0; c.row == N && i < reader.closing_count; ++i)
      if (c.tile * TILE + reader.entry[i] == without) reader.closing[i] = -INFINITY;
    return reader.closing_mass(*a.logits.kernels, alpha);
  }

  Child draw_closing(const std::vector<ClosingTile>& closing, const std::vector<double>& mass, double u,
                     int64_t without) {
    double sum = 0, before = 0;
    for (double m : mass) sum += m;
    const double target = u * sum;
    size_t chosen = 0;
    double start = 0;
    for (size_t i = 0; i < mass.size(); ++i) {
      if (!(before + mass[i] > before)) continue;
      chosen = i;
      start = before;
      before += mass[i];
      if (before > target) break;
    }
    const ClosingTile& c = closing[chosen];
    const auto [max, tile_sum] = read_closing(c, without);
    const double share = (target - start) / mass[chosen];
    const int64_t i = a.logits.kernels->search(reader.closing, reader.closing_count, alpha, max, share * tile_sum);
    return child(c.row, c.tile * TILE + reader.entry[i]);
  }

  // ---- survivors

  void survive() {
    weigh_open();
    if (top == -INFINITY) return;
    double log_floor = -INFINITY;
    if (a.rho > 0) log_floor = std::log(a.rho / N) + log_add(total(Tally::MASS_), top + std::log(left()));
    take_heavy(log_floor);
    const bool light_reference = has_reference && std::find(heavy.begin(), heavy.end(), reference) == heavy.end();
    if (std::exp(std::min(log_threshold - top, 700.0)) == 0) {
      // Nothing but what is kept has any mass; the reference is kept with the weight that it has.
      if (light_reference) light.push_back(child(N, reference.token));
      return;
    }
    draw_light(log_threshold > log_floor, light_reference);
  }

  void weigh_open() {
    rest.assign(R * tiles, {-INFINITY, -1, 0.0});
    row_mass.assign(R, 0.0);
    row_tile.assign(R, 0);
    for (int64_t i = 0; i < R; ++i) {
      if (!rows[i].holds_particle) continue;
      for (int64_t t = 0; t < tiles; ++t) rest_of(i, t).max = open(i, t).max;
      find_row_maximum(i);
      top = std::max(top, weight(i, rest_of(i, row_tile[i]).max));
    }
    for (int64_t i = 0; i < R; ++i) {
      if (!rows[i].holds_particle) continue;
      for (int64_t t = 0; t < tiles; ++t)
        rest_of(i, t).mass = scale(i, rest_of(i, t).max) * (1.0 + static_cast<double>(open(i, t).rest));
      sum_row(i);
    }
  }

  double scale(int64_t row, float max) const { return max == -INFINITY ? 0.0 : std::exp(weight(row, max) - top); }

  void find_row_maximum(int64_t row) {
    int64_t& best = row_tile[row];
    best = 0;
    for (int64_t t = 1; t < tiles; ++t)
      if (rest_of(row, t).max > rest_of(row, best).max) best = t;
  }

  void sum_row(int64_t row) {
    double sum = 0;
    for (int64_t t = 0; t < tiles; ++t) sum += rest_of(row, t).mass;
    row_mass[row] = sum;
  }

  double left() const {
    double sum = 0;
    for (int64_t p = 0; p < R; ++p) sum += row_mass[order(p)];
    return sum;
  }

  // The heavy children, the heaviest first, and log kappa. What is left is summed without them: a difference of large
  // sums may come out as 0, and all children as heavy.
  void take_heavy(double log_floor) {
    const double floor = std::exp(std::min(log_floor - top, 700.0));
    double mass_left;
    for (;;) {
      int64_t row = -1;
      double heaviest = -INFINITY;
      for (int64_t p = 0; p < R; ++p) {
        const int64_t i = order(p);
        if (!rows[i].holds_particle) continue;
        const double w = weight(i, rest_of(i, row_tile[i]).max);
        if (w > heaviest) heaviest = w, row = i;
      }
      mass_left = left();
      const double most = row < 0 ? 0.0 : std::exp(heaviest - top);
      if (most <= 0 || most < floor || most * static_cast<double>(N - static_cast<int64_t>(heavy.size())) <= mass_left)
        break;
      take(row, row_tile[row]);
    }
    const double places = static_cast<double>(N - static_cast<int64_t>(heavy.size()));
    log_threshold = mass_left <= 0 ? log_floor : std::max(log_floor, top + std::log(mass_left) - std::log(places));
  }

  // Makes the largest child that is left of the tile a heavy one.
  void take(int64_t row, int64_t t) {
    Rest& tile = rest_of(row, t);
    if (tile.argmax < 0) {
      read_rest(row, t);
      tile.argmax = a.logits.kernels->argmax(reader.open, a.logits.tile_size(t));
    }
    heavy.push_back({row, t * TILE + tile.argmax, weight(row, tile.max)});
    const int64_t n = a.logits.tile_size(t);
    read_rest(row, t);
    tile.argmax = a.logits.kernels->argmax(reader.open, n);
    tile.max = reader.open[tile.argmax];
    tile.mass = 0.0;
    if (tile.max > -INFINITY)
      tile.mass = scale(row, tile.max) * a.logits.kernels->sum(reader.open, n, alpha, tile.max);
    find_row_maximum(row);
    sum_row(row);
  }

  // What is left of a tile is then in the reader.
  void read_rest(int64_t row, int64_t t) {
    reader.read(a.logits, a.closes, row_of_logits(row), t, last);
    for (const Child& c : heavy)
      if (c.row == row && c.token / TILE == t) reader.open[c.token - t * TILE] = -INFINITY;
  }

  // The systematic draw along the line of what is left, kappa > 0. has_places: kappa makes the inclusions add up to the
  // places that the heavy children leave; otherwise it is the floor, and there are as many points as the line has.
  void draw_light(bool has_places, bool light_reference) {
    std::vector<double> line(R * tiles);  // the end of each tile, in the order of the line
    double end = 0;
    for (int64_t p = 0; p < R; ++p)
      for (int64_t t = 0; t < tiles; ++t) line[p * tiles + t] = end += rest_of(order(p), t).mass;
    const double log_kappa = log_threshold - top;
    const double kappa = log_kappa < 700.0 ? std::exp(log_kappa) : INFINITY;
    const int64_t places = N - static_cast<int64_t>(heavy.size());
    int64_t count = places;
    if (!has_places) count = static_cast<int64_t>(std::min(std::ceil(end / kappa), static_cast<double>(places)));
    double u = a.uniform[2 * g];
    int64_t own_point = -1;
    if (light_reference) {
      // Its part ends before the line does, whatever is rounded.
      const double before_end = std::nextafter(static_cast<double>(std::max<int64_t>(count, 1)), 0.0);
      const double v = std::min(reference_point(line, u) / kappa, before_end);
      own_point = static_cast<int64_t>(v);
      u = v - std::floor(v);
    }
    int64_t at = 0;
    for (int64_t k = 0; k < std::max<int64_t>(count, light_reference); ++k) {
      if (k == own_point) {
        light.push_back({N, reference.token, light_weight(N, reference.token / TILE)});
        continue;
      }
      const double target = (u + static_cast<double>(k)) * kappa;
      if (!has_places && target >= end) continue;
      const Child drawn = at_point(line, target, at);
      // Only rounding could make it the child of another point.
      const bool again = (light_reference && drawn == reference) || (!light.empty() && drawn == light.back());
      if (!again) light.push_back(drawn);
    }
  }

  struct Tile64 {
    double sum;     // of what is left, relative to its maximum
    double stretch;  // sum over the recorded mass, which is relative, too
  };

  // Reads what is left of a tile unless the reader has it.
  Tile64 tile64(int64_t row, int64_t t) {
    const Rest& tile = rest_of(row, t);
    if (in_reader != row * tiles + t) {
      read_rest(row, t);
      in_reader = row * tiles + t;
      reader_sum = a.logits.kernels->sum(reader.open, a.logits.tile_size(t), alpha, tile.max);
    }
    return {reader_sum, tile.mass > 0 ? reader_sum * scale(row, tile.max) / tile.mass : 1.0};
  }
  double reader_sum = 0;

  double light_weight(int64_t row, int64_t t) { return log_threshold + std::log(tile64(row, t).stretch); }

  // The point of the line that the reference, a light child, is found at: a uniform one of its own part.
  double reference_point(const std::vector<double>& line, double u) {
    const int64_t t = reference.token / TILE, own = reference.token - t * TILE;
    const int64_t at = place_of[N] * tiles + t;
    const double start = at > 0 ? line[at - 1] : 0.0;
    const Rest& tile = rest_of(N, t);
    if (!(tile.mass > 0)) return start;
    const double unit = tile.mass / tile64(N, t).sum;  // of the line, for a mass relative to the tile's maximum
    double before = 0;
    if (own > 0) before = sum_before(own, tile.max);
    return start + (before + u * std::exp(alpha * (reader.open[own] - static_cast<double>(tile.max)))) * unit;
  }

  // The mass of the entries before one, of what is in the reader.
  double sum_before(int64_t entry, float max) {
    std::vector<float> head(TILE, -INFINITY);
    std::copy(reader.open, reader.open + entry, head.begin());
    return a.logits.kernels->sum(head.data(), entry, alpha, max);
  }

  // The child that holds a point of the line. at: where to begin, a tile that does not lie behind it; moved up to it.
  Child at_point(const std::vector<double>& line, double target, int64_t& at) {
    // A tile that adds nothing to the line holds no point, not even where rounding puts the target at the end.
    for (int64_t i = at; i < R * tiles; ++i) {
      if (!(line[i] > (i > 0 ? line[i - 1] : 0.0))) continue;
      at = i;
      if (line[i] > target) break;
    }
    const int64_t row = order(at / tiles), t = at % tiles;
    const Rest& tile = rest_of(row, t);
    const Tile64 exact = tile64(row, t);
    const double start = at > 0 ? line[at - 1] : 0.0;
    const int64_t entry = a.logits.kernels->search(reader.open, a.logits.tile_size(t), alpha, tile.max,
                                                   (target - start) / tile.mass * exact.sum);
    return {row, t * TILE + entry, light_weight(row, t)};
  }

  // ---- rows

  // The survivors in rows, token -1 where there is none: the reference in the last, the first child of a particle in
  // its parent's, others where no particle has a child.
  std::vector<Child> placed() const {
    std::vector<Child> taken(R, Child{-1, -1, -INFINITY}), waiting;
    for (const std::vector<Child>* survivors : {&heavy, &light})
      for (const Child& c : *survivors) {
        const int64_t row = has_reference && c == reference ? N : c.row < N && taken[c.row].token < 0 ? c.row : -1;
        if (row < 0)
          waiting.push_back(c);
        else
          taken[row] = c;
      }
    int64_t free = 0;
    for (const Child& c : waiting) {
      while (free < N && taken[free].token >= 0) ++free;
      if (free < N) taken[free] = c;
    }
    return taken;
  }

  // taken: one a row; empty for none at all. kept: the new candidate.
  void write(const std::vector<Child>& taken, const Child& kept, double threshold) {
    std::vector<int32_t> sorted, empty;
    for (int64_t i = 0; i < R; ++i) {
      const bool has_child = !taken.empty() && taken[i].token >= 0;
      (has_child ? sorted : empty).push_back(static_cast<int32_t>(i));
      a.parent[g * R + i] = has_child ? static_cast<int32_t>(taken[i].row) : -1;
      a.token[g * R + i] = has_child ? taken[i].token : -1;
      a.child_log_weight[g * R + i] = has_child ? taken[i].log_weight : -INFINITY;
      a.logp[g * R + i] = has_child ? logp(taken[i]) : NAN;
    }
    std::sort(sorted.begin(), sorted.end(), [&](int32_t i, int32_t j) {
      return std::pair(place_of[taken[i].row], taken[i].token) < std::pair(place_of[taken[j].row], taken[j].token);
    });
    std::copy(empty.begin(), empty.end(), std::copy(sorted.begin(), sorted.end(), a.child_order + g * R));
    const bool is_new = !taken.empty() && kept.token >= 0;
    a.candidate[2 * g] = is_new ? kept.row : -1;
    a.candidate[2 * g + 1] = is_new ? kept.token : -1;
    a.candidate_logp[g] = is_new ? logp(kept) : NAN;
    a.log_threshold[g] = threshold;
  }
};

}  // namespace

void branch_particles_out(Tensor logits, Tensor alpha, Tensor log_weight, Tensor order,
                          std::optional<Tensor> stop_state, Tensor reference, Tensor last, Tensor closing_bonus,
                          Tensor uniform, Tensor eos, std::optional<Tensor> stop_next, double length_bonus, double rho,
                          Tensor workspace, Tensor tally, Tensor parent, Tensor token, Tensor child_log_weight,
                          Tensor logp, Tensor child_order, Tensor candidate, Tensor candidate_logp,
                          Tensor log_threshold, Tensor status) {
  STD_TORCH_CHECK(log_weight.dim() == 2 && log_weight.size(1) >= 3, "log_weight must have shape [groups, N + 1]");
  const int64_t G = log_weight.size(0), R = log_weight.size(1);
  Logits z(logits);
  const int64_t V = z.V, tiles = z.tiles;
  STD_TORCH_CHECK(z.rows == G * R, "logits must have a row for each of log_weight's");
  Closing closes{V, tiles, {}};
  const int64_t* tokens = data_of<const int64_t>(eos, {eos.numel()}, "eos");
  for (int64_t i = 0; i < eos.numel(); ++i)
    if (0 <= tokens[i] && tokens[i] < V) closes.eos.push_back(tokens[i]);
  std::sort(closes.eos.begin(), closes.eos.end());
  closes.eos.erase(std::unique(closes.eos.begin(), closes.eos.end()), closes.eos.end());
  if (stop_next && stop_state && stop_next->dim() == 2 && stop_next->size(0) > 0) {
    closes.states = stop_next->size(0);
    closes.stop_next = data_of<const int16_t>(*stop_next, {closes.states, V}, "stop_next");
    closes.stop_state = data_of<const int16_t>(*stop_state, {G, R}, "stop_state");
  }
  STD_TORCH_CHECK(workspace.element_size() == 4 && workspace.is_contiguous() && workspace.numel() >= 8 * G * R * tiles,
                  "workspace must be contiguous float32 with 8 * ceil(V / 256) elements a row");
  TileMass* slots = static_cast<TileMass*>(workspace.data_ptr());
  OpenMass* open = reinterpret_cast<OpenMass*>(static_cast<float*>(workspace.data_ptr()) + 4 * G * R * tiles);
  const Arguments a{z,
                    G,
                    R,
                    data_of<const float>(alpha, {G}, "alpha"),
                    data_of<const double>(log_weight, {G, R}, "log_weight"),
                    data_of<const int32_t>(order, {G, R}, "order"),
                    data_of<const int64_t>(reference, {G}, "reference"),
                    data_of<const bool>(last, {G}, "last"),
                    data_of<const double>(closing_bonus, {G}, "closing_bonus"),
                    data_of<const double>(uniform, {G, 2}, "uniform"),
                    length_bonus,
                    rho,
                    std::move(closes),
                    data_of<double>(tally, {G, 4}, "tally"),
                    data_of<int32_t>(parent, {G, R}, "parent"),
                    data_of<int64_t>(token, {G, R}, "token"),
                    data_of<double>(child_log_weight, {G, R}, "child_log_weight"),
                    data_of<double>(logp, {G, R}, "logp"),
                    data_of<int32_t>(child_order, {G, R}, "child_order"),
                    data_of<int64_t>(candidate, {G, 2}, "candidate"),
                    data_of<double>(candidate_logp, {G}, "candidate_logp"),
                    data_of<double>(log_threshold, {G}, "log_threshold"),
                    data_of<int32_t>(status, {G, R}, "status"),
                    slots,
                    open};
  // Each tile's record depends on that tile only, and each group's results on its own records: the split among threads
  // cannot change a result.
  constexpr int64_t GRAIN = 8;  // tiles; about 5 us, the cost of waking a thread
  torch::stable::parallel_for(0, G * R * tiles, GRAIN, [&](int64_t begin, int64_t end) {
    TileReader reader;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, group = b / R;
      // `combine` does not look at the records of a row whose alpha is unsound, nor the finisher at an empty row's.
      if (a.log_weight[b] == -INFINITY || !sound_exponent(a.alpha[group])) continue;
      tile_pass(a.logits, a.closes, b, i % tiles, a.alpha[group], a.last[group], reader, slots + i, open + i);
    }
  });
  torch::stable::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) Group(a, g).run();
  });
}

void select_candidate_out(Tensor tally_, Tensor uniform_, Tensor moved_) {
  STD_TORCH_CHECK(tally_.dim() == 2, "tally must have shape [groups, 4]");
  const int64_t G = tally_.size(0);
  const double* tally = data_of<const double>(tally_, {G, 4}, "tally");
  const double* uniform = data_of<const double>(uniform_, {G}, "uniform");
  bool* moved = data_of<bool>(moved_, {G}, "moved");
  for (int64_t g = 0; g < G; ++g) {
    const auto value = [&](Tally column) { return tally[4 * g + static_cast<int64_t>(column)]; };
    const double others = value(Tally::OTHERS_), kept = value(Tally::KEPT_), reference = value(Tally::REFERENCE_);
    const double top = std::max(others, reference), share = std::exp(others - top);
    const double without_kept = std::max(share - std::exp(kept - top), 0.0) + std::exp(reference - top);
    moved[g] = others != -INFINITY && uniform[g] * without_kept < share;
  }
}

void add_particles(torch::stable::detail::StableLibrary& m) {
  m.impl("branch_particles_out", TORCH_BOX(&branch_particles_out));
  m.impl("select_candidate_out", TORCH_BOX(&select_candidate_out));
}

}  // namespace power_kernels
