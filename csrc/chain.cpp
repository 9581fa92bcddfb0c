// The chain (DESIGN sections 3, 5.4 and 5.5): mh_accept, for stacks that keep their own chains, and mh_advance, one
// decode step of the whole law for every lane, or several in a row. power_kernels/reference/chain.py is the specification; the arithmetic here
// is the same float64 operations in the same order, so that the two agree bit for bit.

#include "rng.h"
#include "state.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace power_kernels {
namespace {

using torch::stable::Tensor;

constexpr int SIDE_BY_SIDE = 8;

// The running sums of section 3.3 of several answers: each is plain float64 in position order. One alone would wait for
// every addition; side by side they fill those waits. A finished answer adds zeros, which leave any sum as it is.
// ahead: floats from an answer to the one that will be summed in its place next, which is fetched meanwhile.
void running_sums(const float* const* weights, const int64_t* lengths, const int64_t* ahead, double* sums) {
  constexpr int64_t BLOCK = 64;
  float padded[SIDE_BY_SIDE][BLOCK];
  const float* block[SIDE_BY_SIDE];
  double sum[SIDE_BY_SIDE] = {};
  const int64_t longest = *std::max_element(lengths, lengths + SIDE_BY_SIDE);
  for (int64_t first = 0; first < longest; first += BLOCK) {
    for (int k = 0; k < SIDE_BY_SIDE; ++k) {
      const int64_t left = std::max<int64_t>(lengths[k] - first, 0);
      if (left >= BLOCK) {
        block[k] = weights[k] + first;
        for (int64_t line = 0; line < BLOCK; line += 16) __builtin_prefetch(block[k] + ahead[k] + line);
      } else {
        if (left > 0) std::copy_n(weights[k] + first, left, padded[k]);
        std::fill(padded[k] + left, padded[k] + BLOCK, 0.0f);
        block[k] = padded[k];
      }
    }
    for (int64_t t = 0; t < BLOCK; ++t) {
      for (int k = 0; k < SIDE_BY_SIDE; ++k) sum[k] += static_cast<double>(block[k][t]);
    }
  }
  std::copy_n(sum, SIDE_BY_SIDE, sums);
}

// NAN before POS_INF, as everywhere.
Status weights_status(const float* weights, int64_t length) {
  Status status = Status::OK_;
  for (int64_t t = 0; t < length; ++t) {
    if (std::isnan(weights[t])) return Status::NAN_;
    if (weights[t] == INFINITY) status = Status::POS_INF_;
  }
  return status;
}

// 1 - q(x_t) = -expm1(logq), Kahan's formula: reference.leave_probability.
double leave_probability(float logq) {
  const double x = logq;
  if (x >= 0) return 0.0;
  const double e = std::exp(x);
  if (e == 1.0) return -x;
  if (e == 0.0) return 1.0;
  return (1.0 - e) * x / std::log(e);
}

// reference.fixed_point_sum: in whole units of 2^-32 nats, so that no order of summation shows.
double fixed_point_sum(const float* logq, int64_t length) {
  constexpr double UNITS = 4294967296.0;
  int64_t sum = 0;
  for (int64_t t = 0; t < length; ++t) {
    sum += static_cast<int64_t>(std::max(static_cast<double>(logq[t]), -65536.0) * UNITS);
  }
  return static_cast<double>(sum) / UNITS;
}

}  // namespace

void mh_accept_out(Tensor weights_cur, Tensor weights_prop, Tensor len_cur, Tensor len_prop, Tensor log_u,
                   Tensor accept, Tensor log_ratio, Tensor status) {
  const int64_t rows = log_u.numel();
  const float* w_cur = static_cast<const float*>(weights_cur.data_ptr());
  const float* w_prop = static_cast<const float*>(weights_prop.data_ptr());
  const int32_t* n_cur = static_cast<const int32_t*>(len_cur.data_ptr());
  const int32_t* n_prop = static_cast<const int32_t*>(len_prop.data_ptr());
  const double* u = static_cast<const double*>(log_u.data_ptr());
  bool* out_accept = static_cast<bool*>(accept.data_ptr());
  double* out_ratio = static_cast<double*>(log_ratio.data_ptr());
  int32_t* out_status = static_cast<int32_t*>(status.data_ptr());
  const int64_t stride_cur = weights_cur.stride(0), stride_prop = weights_prop.stride(0);
  const int64_t max_cur = weights_cur.size(1), max_prop = weights_prop.size(1);

  constexpr int64_t PAIRS = SIDE_BY_SIDE / 2;
  const auto sound = [&](int64_t b) {
    return n_cur[b] >= 1 && n_cur[b] <= max_cur && n_prop[b] >= 1 && n_prop[b] <= max_prop;
  };

  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    const float* answer[SIDE_BY_SIDE];
    int64_t length[SIDE_BY_SIDE], ahead[SIDE_BY_SIDE];
    double sum[SIDE_BY_SIDE];
    for (int k = 0; k < SIDE_BY_SIDE; ++k) ahead[k] = PAIRS * (k % 2 ? stride_prop : stride_cur);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t pair = (b - begin) % PAIRS;
      if (pair == 0) {
        for (int64_t i = 0; i < PAIRS; ++i) {
          const bool there = b + i < end && sound(b + i);
          answer[2 * i] = there ? w_cur + (b + i) * stride_cur : nullptr;
          answer[2 * i + 1] = there ? w_prop + (b + i) * stride_prop : nullptr;
          length[2 * i] = there ? n_cur[b + i] : 0;
          length[2 * i + 1] = there ? n_prop[b + i] : 0;
        }
        running_sums(answer, length, ahead, sum);
      }
      const double sum_cur = sum[2 * pair], sum_prop = sum[2 * pair + 1];
      Status row = Status::OK_;
      double ratio = std::numeric_limits<double>::quiet_NaN();
      bool accepted = false;
      if (!sound(b)) {
        row = Status::BAD_LENGTH_;
      } else {
        // A finite sum has no NaN and no infinity in it.
        const Status a = std::isfinite(sum_cur) ? Status::OK_ : weights_status(answer[2 * pair], n_cur[b]);
        const Status p = std::isfinite(sum_prop) ? Status::OK_ : weights_status(answer[2 * pair + 1], n_prop[b]);
        if (a == Status::NAN_ || p == Status::NAN_ || std::isnan(u[b])) {
          row = Status::NAN_;
        } else if (a == Status::POS_INF_ || p == Status::POS_INF_ || u[b] == INFINITY) {
          row = Status::POS_INF_;
        } else {
          const double f_cur = sum_cur - std::log(static_cast<double>(n_cur[b]));
          const double f_prop = sum_prop - std::log(static_cast<double>(n_prop[b]));
          ratio = f_prop - f_cur;
          if (std::isnan(ratio)) {
            row = Status::NAN_;  // -inf against -inf: neither answer can occur
          } else {
            accepted = !(f_prop < f_cur + u[b]);
          }
        }
      }
      out_accept[b] = accepted;
      out_ratio[b] = ratio;
      out_status[b] = static_cast<int32_t>(row);
    }
  });
}

namespace {

struct Law {
  int64_t max_new_tokens, block_size, mcmc_steps, final_steps;
  bool early_rejection, free_prefix, karan_du, stops;
  Cut cut;
  bool diverges() const { return cut != Cut::UNIFORM_; }
};

// Pointers to the tensors of ChainState, to the constants and to what was sampled.
struct State {
  int32_t* field;
  int32_t* token;
  float* logq;
  double* cumw;
  double* cumz;
  int16_t* stop_state;
  int8_t* outcome;
  int32_t* left;
  int32_t* forwarded;
  double* step_weight;
  double* step_logq;
  int64_t* cost;
  int32_t* lane_field;
  int32_t* lane_token;
  float* lane_logq;
  double* lane_cumw;
  double* lane_cumz;
  int16_t* lane_stop_state;
  double* lane_theta;
  int64_t* input_id;
  int64_t* position;
  int32_t* counter;
  int64_t* exclude;
  int32_t* commit_range;
  int32_t* open_range;
  const double* length_term;
  const int64_t* seeds;
  bool own_seeds;  // one a chain, or one for all
  const int64_t* eos;
  int64_t eos_count;
  const int16_t* stop_next;
  int64_t vocabulary;  // columns of stop_next
  const int64_t* sampled_token;
  const float* sampled_logq;
  const float* sampled_weight;
  const int32_t* sampled_status;
  const float* sampled_entropy;
  int64_t draws;     // a lane: columns of what was sampled
  int64_t lanes;     // per chain
  int64_t width;     // of the token rows: max_new_tokens + 1
  int64_t z_width;   // of the rows of cumz: as many, or none
  int64_t a_width;   // of the rows of stop_state: as many, or none
  int64_t serials;   // of the rows by serial
};

constexpr int32_t NO_EPOCH = -1;

// One chain of one launch: what one Triton program does.
class Advance {
 public:
  // epochs: room for one number a lane of the chain.
  Advance(const State& s, const Law& law, int64_t chain, int32_t* epochs)
      : s_(s),
        law_(law),
        c_(chain),
        first_(chain * s.lanes),
        end_(first_ + s.lanes),
        seed_(static_cast<uint64_t>(s.seeds[s.own_seeds ? chain : 0])),
        field_(s.field + chain * CHAIN_FIELDS),
        token_(s.token + chain * s.width),
        logq_(s.logq + chain * s.width),
        cumw_(s.cumw + chain * s.width),
        cumz_(s.cumz + chain * s.z_width),
        stop_state_(s.stop_state + chain * s.a_width),
        outcome_(s.outcome + chain * s.serials),
        left_(s.left + chain * s.serials),
        forwarded_(s.forwarded + chain * s.serials),
        epochs_(epochs) {}

  void run() {
    for (int64_t lane = first_; lane < end_; ++lane) epochs_[lane - first_] = lane_field(lane, LaneField::EPOCH_);
    int64_t turn = 0;
    while (turn < s_.draws && take_turn(turn)) ++turn;
    // The turns that nobody has a draw for would change nothing else.
    if (turn + 1 < s_.draws) clear_ranges();
    for (int64_t lane = first_; lane < end_; ++lane) emit(lane);
  }

 private:
  // The next draw of each lane that has one, and all that follows from them. Returns whether a lane had one.
  bool take_turn(int64_t turn) {
    bool any = false;
    clear_ranges();
    if (mode() == Mode::EXTEND_ || mode() == Mode::PROPOSE_) {
      for (int64_t lane = first_; lane < end_; ++lane) {
        if (!has_draw(lane, turn)) continue;
        receive(lane, lane * s_.draws + turn);
        any = true;
      }
      resolve();
    }
    schedule();
    return any;
  }

  // A lane's draws are those of what it ran when the launch began: once it runs something else, or has none this time,
  // the rest of its row is void.
  bool has_draw(int64_t lane, int64_t turn) {
    int32_t& epoch = epochs_[lane - first_];
    const bool has = status(lane) == LaneStatus::RUNNING_ && lane_field(lane, LaneField::EPOCH_) == epoch &&
                     s_.sampled_status[lane * s_.draws + turn] != static_cast<int32_t>(Status::PENDING_);
    if (!has) epoch = NO_EPOCH;
    return has;
  }

  // -- accessors

  int32_t& field(ChainField f) { return field_[static_cast<int32_t>(f)]; }
  int32_t& lane_field(int64_t lane, LaneField f) {
    return s_.lane_field[lane * LANE_FIELDS + static_cast<int32_t>(f)];
  }
  Mode mode() { return static_cast<Mode>(field(ChainField::MODE_)); }
  void set_mode(Mode m) { field(ChainField::MODE_) = static_cast<int32_t>(m); }
  LaneStatus status(int64_t lane) { return static_cast<LaneStatus>(lane_field(lane, LaneField::STATUS_)); }
  void set_status(int64_t lane, LaneStatus v) { lane_field(lane, LaneField::STATUS_) = static_cast<int32_t>(v); }
  void add_cost(Cost column, int64_t tokens) { s_.cost[c_ * 4 + static_cast<int32_t>(column)] += tokens; }
  static void set_range(int32_t* range, int64_t to, int64_t from, int64_t start, int64_t stop) {
    range[0] = static_cast<int32_t>(to);
    range[1] = static_cast<int32_t>(from);
    range[2] = static_cast<int32_t>(start);
    range[3] = static_cast<int32_t>(stop);
  }
  void clear_ranges() {
    set_range(s_.commit_range + c_ * 4, c_, 0, 0, 0);
    for (int64_t lane = first_; lane < end_; ++lane) set_range(s_.open_range + lane * 4, lane, c_, 0, 0);
  }
  bool is_eos(int64_t token) const { return std::find(s_.eos, s_.eos + s_.eos_count, token) != s_.eos + s_.eos_count; }
  // Where a closed answer must end: the horizon, or the current length in the published code.
  int32_t cap() {
    return law_.karan_du && mode() == Mode::PROPOSE_ ? field(ChainField::LENGTH_) : field(ChainField::HORIZON_);
  }
  Uniforms draw_uniforms(int64_t position, int32_t serial, uint32_t stream) {
    return uniforms(counter_words(static_cast<uint32_t>(position), static_cast<uint32_t>(serial),
                                  static_cast<uint32_t>(field(ChainField::CHAIN_ID_)),
                                  static_cast<uint32_t>(field(ChainField::PROMPT_ID_)), stream),
                    seed_);
  }

  // -- 1. a sampled token of one running lane: entry `draw` of what was sampled

  void receive(int64_t lane, int64_t draw) {
    const bool extending = mode() == Mode::EXTEND_;
    const int32_t serial = lane_field(lane, LaneField::SERIAL_);
    const int32_t div = lane_field(lane, LaneField::DIVERGENCE_);
    int32_t pos = lane_field(lane, LaneField::POSITION_);
    add_cost(extending ? Cost::EXTENSION_ : Cost::PROPOSAL_, 1);
    if (!extending) ++forwarded_[serial];
    // The token it fed is the chain's own.
    if (pos <= div) lane_field(lane, LaneField::VALID_) = field(ChainField::BASE_) + pos;
    if (pos < div) {  // a forwarded prefix: what was sampled there is not used
      lane_field(lane, LaneField::POSITION_) = pos + 1;
      if (pos + 1 == field(ChainField::LENGTH_)) {
        unchanged(lane, serial);
      } else {
        ++lane_field(lane, LaneField::EPOCH_);
      }
      return;
    }
    const int64_t token = s_.sampled_token[draw];
    const float logq = s_.sampled_logq[draw], weight = s_.sampled_weight[draw];
    const float h = law_.cut == Cut::DIVERGENCE_ENTROPY_ ? s_.sampled_entropy[draw] : 1.0f;
    Status sampled = static_cast<Status>(s_.sampled_status[draw]);
    if (sampled == Status::OK_) {  // numbers that would poison the chain, whoever made them
      if (std::isnan(weight) || std::isnan(logq) || std::isnan(h)) {
        sampled = Status::NAN_;
      } else if (weight == INFINITY || h == INFINITY) {
        sampled = Status::POS_INF_;
      } else if (law_.stops && (token < 0 || token >= s_.vocabulary)) {
        sampled = Status::BAD_TOKEN_;
      }
    }
    if (sampled != Status::OK_) {
      set_status(lane, LaneStatus::FAULTED_);
      lane_field(lane, LaneField::FAULT_) = static_cast<int32_t>(sampled);
      return;
    }
    if (pos == div && !extending && token == lane_field(lane, LaneField::EXCLUDE_)) {
      // Nothing else has mass: the token is kept and the walk goes on. A divergence cut has no walk, and only rounding
      // takes it to such a place.
      if (law_.diverges()) {
        unchanged(lane, serial);
      } else {
        start(lane, serial, pos + 1);
      }
      return;
    }
    double* lane_cumw = s_.lane_cumw + lane * s_.width;
    const double total = (pos == div ? cumw_[pos] : lane_cumw[pos]) + static_cast<double>(weight);
    s_.lane_token[lane * s_.width + pos] = static_cast<int32_t>(token);
    s_.lane_logq[lane * s_.width + pos] = logq;
    lane_cumw[pos + 1] = total;
    double z = 0.0;
    if (law_.diverges()) {
      double* lane_cumz = s_.lane_cumz + lane * s_.z_width;
      // max: entropies round, and Z must not fall
      z = (pos == div ? cumz_[pos] : lane_cumz[pos]) + leave_probability(logq) * std::max(static_cast<double>(h), 0.0);
      lane_cumz[pos + 1] = z;
    }
    bool ends = is_eos(token);
    if (law_.stops) {
      int16_t* lane_stop_state = s_.lane_stop_state + lane * s_.a_width;
      const int64_t before = pos == div ? stop_state_[pos] : lane_stop_state[pos];
      lane_stop_state[pos + 1] = s_.stop_next[before * s_.vocabulary + token];
      ends = ends || lane_stop_state[pos + 1] < 0;
    }
    lane_field(lane, LaneField::POSITION_) = ++pos;
    const bool closed = ends || pos == cap();
    bool rejected = false;
    if (!extending) {
      const double theta = s_.lane_theta[lane];
      if (law_.karan_du) {
        rejected = closed && total - cumw_[pos] < theta;
      } else if (closed || law_.early_rejection) {
        // An open answer ends at its next token at the earliest, and at the horizon if nothing else ends it. In between
        // F can become no more than at these two: no weight is positive, the term is convex, Z grows.
        const int32_t at_least = closed ? pos : s_.eos_count > 0 || law_.stops ? pos + 1 : cap();
        const double most = std::max(s_.length_term[at_least], s_.length_term[closed ? pos : cap()]);
        // Z = 0 takes rounding, and no step leaves such an answer: none may go there.
        const bool stuck = law_.diverges() && closed && z == 0.0;
        rejected = stuck || total + most - (law_.diverges() ? std::log(z) : 0.0) < theta;
      }
    }
    if (rejected) {
      outcome_[serial] = static_cast<int8_t>(Outcome::REJECTED_);
      set_status(lane, LaneStatus::IDLE_);
      if (!closed) add_cost(Cost::SAVED_EARLY_, cap() - pos);
    } else if (closed) {
      set_status(lane, LaneStatus::CLOSED_);
    }
  }

  // -- 2. the lowest unresolved serial, if its lane is closed

  // The lane that holds it, or -1 when no lane is held.
  int64_t lowest() {
    int64_t best = -1;
    for (int64_t lane = first_; lane < end_; ++lane) {
      if (status(lane) == LaneStatus::IDLE_) continue;
      if (best < 0 || lane_field(lane, LaneField::SERIAL_) < lane_field(best, LaneField::SERIAL_)) best = lane;
    }
    return best;
  }

  void resolve() {
    const int64_t lane = lowest();
    if (lane < 0) return;
    if (status(lane) == LaneStatus::FAULTED_) {
      // This step and those prefetched after it were not made.
      if (mode() == Mode::PROPOSE_) field(ChainField::OPENED_) = lane_field(lane, LaneField::SERIAL_);
      stop(Mode::FAULT_, lane_field(lane, LaneField::FAULT_));
    } else if (status(lane) == LaneStatus::CLOSED_) {
      commit(lane);
    }
  }

  void stop(Mode m, int32_t fault) {
    set_mode(m);
    field(ChainField::FAULT_) = fault;
    for (int64_t lane = first_; lane < end_; ++lane) set_status(lane, LaneStatus::IDLE_);
  }

  void commit(int64_t lane) {
    const int32_t base = field(ChainField::BASE_), length = field(ChainField::LENGTH_);
    const int32_t serial = lane_field(lane, LaneField::SERIAL_);
    const int32_t div = lane_field(lane, LaneField::DIVERGENCE_), pos = lane_field(lane, LaneField::POSITION_);
    const int64_t row = lane * s_.width;
    std::copy(s_.lane_token + row + div, s_.lane_token + row + pos, token_ + div);
    std::copy(s_.lane_logq + row + div, s_.lane_logq + row + pos, logq_ + div);
    std::copy(s_.lane_cumw + row + div + 1, s_.lane_cumw + row + pos + 1, cumw_ + div + 1);
    if (law_.diverges()) std::copy(s_.lane_cumz + row + div + 1, s_.lane_cumz + row + pos + 1, cumz_ + div + 1);
    if (law_.stops)
      std::copy(s_.lane_stop_state + row + div + 1, s_.lane_stop_state + row + pos + 1, stop_state_ + div + 1);
    field(ChainField::LENGTH_) = pos;
    field(ChainField::CLOSED_) = is_eos(token_[pos - 1]) || (law_.stops && stop_state_[pos] < 0);
    // The chain's KV lacks its last token; an extension starts there and so must copy it too.
    set_range(s_.commit_range + c_ * 4, c_, lane, base + std::min(div, length - 1), base + pos - 1);
    for (int64_t other = first_; other < end_; ++other) {
      set_status(other, LaneStatus::IDLE_);
      int32_t& valid = lane_field(other, LaneField::VALID_);
      // A lane that walked on in this launch counts on a copy that its next opening will replace.
      const int32_t* range = s_.open_range + other * 4;
      valid = std::min(range[3] > range[2] ? range[2] : valid, base + div);
    }
    lane_field(lane, LaneField::VALID_) = base + pos - 1;
    const bool extending = mode() == Mode::EXTEND_;
    const int64_t step = c_ * (s_.serials + 1) + (extending ? field(ChainField::OPENED_) : serial);
    s_.step_weight[step] = cumw_[pos];
    s_.step_logq[step] = fixed_point_sum(logq_, pos);
    if (extending) {
      set_mode(Mode::PROPOSE_);
      field(ChainField::LAST_) = field(ChainField::OPENED_) - 1 + static_cast<int32_t>(law_.mcmc_steps);
    } else {
      outcome_[serial] = static_cast<int8_t>(Outcome::ACCEPTED_);
      field(ChainField::OPENED_) = serial + 1;
    }
  }

  // -- 3. the schedule: open lanes, end stages

  void schedule() {
    if (mode() == Mode::START_) {
      field(ChainField::OPENED_) = 1;
      cumw_[0] = 0.0;
      if (law_.diverges()) cumz_[0] = 0.0;
      if (law_.stops) stop_state_[0] = 0;
      extend();
    }
    while (mode() == Mode::PROPOSE_) {
      for (int64_t lane = first_; lane < end_; ++lane) {
        while (status(lane) == LaneStatus::IDLE_ && field(ChainField::OPENED_) <= field(ChainField::LAST_)) open(lane);
      }
      if (lowest() >= 0) return;
      const bool last_stage =
          field(ChainField::CLOSED_) || field(ChainField::STAGE_) * law_.block_size >= law_.max_new_tokens;
      if (!last_stage && !field(ChainField::FINAL_)) {
        extend();
      } else if (law_.final_steps > 0 && !field(ChainField::FINAL_)) {
        field(ChainField::FINAL_) = 1;
        field(ChainField::HORIZON_) = static_cast<int32_t>(law_.max_new_tokens);
        field(ChainField::LAST_) = field(ChainField::OPENED_) - 1 + static_cast<int32_t>(law_.final_steps);
      } else {
        stop(Mode::DONE_, 0);
      }
    }
  }

  // Begin the next stage: lane 0 grows the answer. An extension is always accepted.
  void extend() {
    const int32_t length = field(ChainField::LENGTH_), stage = field(ChainField::STAGE_);
    const int64_t start = law_.karan_du ? length : stage * law_.block_size;
    set_mode(Mode::EXTEND_);
    field(ChainField::STAGE_) = stage + 1;
    field(ChainField::HORIZON_) = static_cast<int32_t>(std::min(start + law_.block_size, law_.max_new_tokens));
    // The published code can extend from the same position twice; those draws must not repeat.
    run_lane(first_, law_.karan_du ? -(stage + 1) : 0, length, length, -1);
  }

  // Open the next serial on an idle lane; a step that turns out unchanged leaves the lane idle.
  void open(int64_t lane) {
    const int32_t serial = field(ChainField::OPENED_)++;
    const int32_t length = field(ChainField::LENGTH_);
    const Uniforms u = draw_uniforms(0, serial, STREAM_STEP);
    const double log_u = std::log(1.0 - u.u1);
    forwarded_[serial] = 0;
    const double f = cumw_[length] + s_.length_term[length];
    if (law_.diverges()) {
      s_.lane_theta[lane] = (f - std::log(cumz_[length])) + log_u;
      // The first d with cumz[d + 1] > u Z. There is none when Z = 0: nothing else can be drawn anywhere.
      const double* sums = cumz_ + 1;
      const int32_t div = static_cast<int32_t>(std::upper_bound(sums, sums + length, u.u0 * cumz_[length]) - sums);
      if (div == length) {
        unchanged(lane, serial);
      } else {
        run_lane(lane, serial, div, div, token_[div]);
      }
      return;
    }
    s_.lane_theta[lane] = law_.karan_du ? log_u : f + log_u;
    start(lane, serial, std::min(static_cast<int32_t>(u.u0 * length), length - 1));
  }

  // Walk the free prefix from a position and run the lane from where it leaves the current answer.
  void start(int64_t lane, int32_t serial, int32_t from) {
    const int32_t length = field(ChainField::LENGTH_);
    int32_t div = from;
    while (div < length && !(draw_uniforms(div, serial, STREAM_POSITION).u1 < leave_probability(logq_[div]))) ++div;
    const int32_t pos = law_.free_prefix ? div : from;
    add_cost(Cost::SAVED_PREFIX_, pos - from);
    if (pos == length) {
      unchanged(lane, serial);
    } else {
      run_lane(lane, serial, div, pos, div < length ? token_[div] : -1);
    }
  }

  // The proposal is the current answer: a step that changed nothing, whatever lanes run beside it.
  void unchanged(int64_t lane, int32_t serial) {
    outcome_[serial] = static_cast<int8_t>(Outcome::UNCHANGED_);
    left_[serial] = -1;
    set_status(lane, LaneStatus::IDLE_);
  }

  // Start a lane that shares [0, div) with its chain and samples position `pos` next.
  void run_lane(int64_t lane, int32_t serial, int32_t div, int32_t pos, int32_t exclude) {
    if (mode() == Mode::PROPOSE_) left_[serial] = div;
    const int32_t valid = lane_field(lane, LaneField::VALID_), stop = field(ChainField::BASE_) + pos - 1;
    set_range(s_.open_range + lane * 4, lane, c_, valid, std::max(valid, stop));
    set_status(lane, LaneStatus::RUNNING_);
    lane_field(lane, LaneField::SERIAL_) = serial;
    lane_field(lane, LaneField::DIVERGENCE_) = div;
    lane_field(lane, LaneField::POSITION_) = pos;
    lane_field(lane, LaneField::VALID_) = stop;
    lane_field(lane, LaneField::EXCLUDE_) = exclude;
    lane_field(lane, LaneField::FAULT_) = 0;
    ++lane_field(lane, LaneField::EPOCH_);
  }

  // -- 4. what each lane feeds next

  void emit(int64_t lane) {
    const int32_t div = lane_field(lane, LaneField::DIVERGENCE_), pos = lane_field(lane, LaneField::POSITION_);
    const LaneStatus now = status(lane);
    if (now == LaneStatus::IDLE_) {
      s_.input_id[lane] = 0;  // harmless: nothing at or beyond VALID is trusted
      s_.position[lane] = lane_field(lane, LaneField::VALID_);
    } else {
      const int32_t* own = pos > div ? s_.lane_token + lane * s_.width : token_;
      s_.input_id[lane] = pos > 0 ? own[pos - 1] : field(ChainField::PROMPT_TOKEN_);
      s_.position[lane] = field(ChainField::BASE_) + pos - 1;
    }
    s_.exclude[lane] = now == LaneStatus::RUNNING_ && pos == div ? lane_field(lane, LaneField::EXCLUDE_) : -1;
    const Words w = counter_words(static_cast<uint32_t>(pos),
                                  static_cast<uint32_t>(lane_field(lane, LaneField::SERIAL_)),
                                  static_cast<uint32_t>(field(ChainField::CHAIN_ID_)),
                                  static_cast<uint32_t>(field(ChainField::PROMPT_ID_)), STREAM_POSITION);
    for (int i = 0; i < 4; ++i) s_.counter[lane * 4 + i] = static_cast<int32_t>(w.w[i]);
  }

  const State& s_;
  const Law& law_;
  const int64_t c_, first_, end_;
  const uint64_t seed_;
  int32_t* const field_;
  int32_t* const token_;
  float* const logq_;
  double* const cumw_;
  double* const cumz_;
  int16_t* const stop_state_;
  int8_t* const outcome_;
  int32_t* const left_;
  int32_t* const forwarded_;
  int32_t* const epochs_;  // by lane: the EPOCH that its draws belong to
};

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace

void mh_advance(Tensor field, Tensor token, Tensor logq, Tensor cumw, Tensor cumz, Tensor stop_state, Tensor outcome,
                Tensor left, Tensor forwarded, Tensor step_weight, Tensor step_logq, Tensor cost, Tensor lane_field,
                Tensor lane_token, Tensor lane_logq, Tensor lane_cumw, Tensor lane_cumz, Tensor lane_stop_state,
                Tensor lane_theta, Tensor input_id, Tensor position, Tensor counter, Tensor exclude,
                Tensor commit_range, Tensor open_range, Tensor length_term, Tensor seed, Tensor eos, Tensor stop_next,
                Tensor sampled_token, Tensor sampled_logq, Tensor sampled_weight, Tensor sampled_status,
                Tensor sampled_entropy, int64_t max_new_tokens, int64_t block_size, int64_t mcmc_steps,
                int64_t final_steps, bool early_rejection, bool free_prefix, bool karan_du, bool stops, int64_t cut) {
  const int64_t chains = field.size(0), rows = lane_field.size(0);
  STD_TORCH_CHECK(chains > 0 && rows >= chains && rows % chains == 0, "every chain must have as many lanes");
  const int64_t draws = sampled_status.numel() / rows;
  STD_TORCH_CHECK(draws > 0 && sampled_status.numel() % rows == 0, "every lane must have as many draws, at least one");
  for (const Tensor* column : {&sampled_token, &sampled_logq, &sampled_weight}) {
    STD_TORCH_CHECK(column->numel() == rows * draws, "what was sampled must have one shape");
  }
  STD_TORCH_CHECK(seed.numel() == 1 || seed.numel() == chains, "seed must have shape [1] or [chains]");
  const State state{
      data<int32_t>(field),
      data<int32_t>(token),
      data<float>(logq),
      data<double>(cumw),
      data<double>(cumz),
      data<int16_t>(stop_state),
      data<int8_t>(outcome),
      data<int32_t>(left),
      data<int32_t>(forwarded),
      data<double>(step_weight),
      data<double>(step_logq),
      data<int64_t>(cost),
      data<int32_t>(lane_field),
      data<int32_t>(lane_token),
      data<float>(lane_logq),
      data<double>(lane_cumw),
      data<double>(lane_cumz),
      data<int16_t>(lane_stop_state),
      data<double>(lane_theta),
      data<int64_t>(input_id),
      data<int64_t>(position),
      data<int32_t>(counter),
      data<int64_t>(exclude),
      data<int32_t>(commit_range),
      data<int32_t>(open_range),
      data<const double>(length_term),
      data<const int64_t>(seed),
      seed.numel() != 1,
      data<const int64_t>(eos),
      eos.numel(),
      data<const int16_t>(stop_next),
      stop_next.size(1),
      data<const int64_t>(sampled_token),
      data<const float>(sampled_logq),
      data<const float>(sampled_weight),
      data<const int32_t>(sampled_status),
      data<const float>(sampled_entropy),
      draws,
      rows / chains,
      token.size(1),
      cumz.size(1),
      stop_state.size(1),
      outcome.size(1),
  };
  const Law law{max_new_tokens, block_size,  mcmc_steps, final_steps,
                early_rejection, free_prefix, karan_du,  stops, static_cast<Cut>(cut)};
  torch::stable::parallel_for(0, chains, 64, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> epochs(state.lanes);
    for (int64_t chain = begin; chain < end; ++chain) Advance(state, law, chain, epochs.data()).run();
  });
}

void add_chain(torch::stable::detail::StableLibrary& m) {
  m.impl("mh_accept_out", TORCH_BOX(&mh_accept_out));
  m.impl("mh_advance", TORCH_BOX(&mh_advance));
}

}  // namespace power_kernels

// Exported so that the string stays in the file, where power_kernels/ops/dispatch.py looks for it before it loads the file.
extern "C" __attribute__((visibility("default"))) const char* power_kernels_state_layout() {
#define PK_SPELL(x) #x
#define PK_STRING(x) PK_SPELL(x)  // of what a macro stands for
#define PK_NAME(name, value) "," #name "=" PK_STRING(value)
  // Each list begins with a comma, which the Python side writes too.
  return "ChainField:" PK_CHAIN_FIELDS(PK_NAME) ";LaneField:" PK_LANE_FIELDS(PK_NAME) ";Mode:" PK_MODES(PK_NAME)
      ";LaneStatus:" PK_LANE_STATUSES(PK_NAME) ";Outcome:" PK_OUTCOMES(PK_NAME) ";Cost:" PK_COSTS(PK_NAME)
      ";Cut:" PK_CUTS(PK_NAME) ";Status:" PK_STATUSES(PK_NAME) ";BlockStatus:" PK_BLOCK_STATUSES(PK_NAME)
      ";SlotField:" PK_SLOT_FIELDS(PK_NAME) ";SlotBound:" PK_SLOT_BOUNDS(PK_NAME) ";SlotFlag:" PK_SLOT_FLAGS(PK_NAME)
      ";Tally:" PK_TALLY(PK_NAME)
      ";tensors:" PK_STATE_TENSORS
      ";pitch=" PK_STRING(PK_CHAIN_PITCH) "," PK_STRING(PK_LANE_PITCH) "," PK_STRING(PK_SLOT_PITCH);
#undef PK_NAME
#undef PK_STRING
#undef PK_SPELL
}
