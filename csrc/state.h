// The columns and codes of power_kernels/state.py, slots.py, block_tables.py and particles.py, which explain them.
// `power_kernels_state_layout` (chain.cpp) spells them out; the Python side looks for that string in the file and does
// not load one without it.
#pragma once

#include <cstdint>

namespace power_kernels {

#define PK_CHAIN_FIELDS(X)                                                                                     \
  X(MODE, 0) X(LENGTH, 1) X(OPENED, 2) X(LAST, 3) X(HORIZON, 4) X(STAGE, 5) X(FINAL, 6) X(BASE, 7)             \
  X(CHAIN_ID, 8) X(PROMPT_ID, 9) X(FAULT, 10) X(CLOSED, 11) X(PROMPT_TOKEN, 12)
#define PK_LANE_FIELDS(X) \
  X(STATUS, 0) X(SERIAL, 1) X(DIVERGENCE, 2) X(POSITION, 3) X(VALID, 4) X(EXCLUDE, 5) X(FAULT, 6) \
  X(EPOCH, 7)
#define PK_MODES(X) X(IDLE, 0) X(START, 1) X(EXTEND, 2) X(PROPOSE, 3) X(DONE, 4) X(FAULT, 5)
#define PK_LANE_STATUSES(X) X(IDLE, 0) X(RUNNING, 1) X(CLOSED, 2) X(FAULTED, 3)
#define PK_OUTCOMES(X) X(REJECTED, 0) X(UNCHANGED, 1) X(ACCEPTED, 2)
#define PK_COSTS(X) X(EXTENSION, 0) X(PROPOSAL, 1) X(SAVED_PREFIX, 2) X(SAVED_EARLY, 3)
#define PK_CUTS(X) X(UNIFORM, 0) X(DIVERGENCE, 1) X(DIVERGENCE_ENTROPY, 2)
#define PK_STATUSES(X) \
  X(PENDING, -1) X(OK, 0) X(NAN, 1) X(POS_INF, 2) X(NO_MASS, 3) X(BAD_TOKEN, 4) X(BAD_LENGTH, 5)
#define PK_BLOCK_STATUSES(X) \
  X(OK, 0) X(OUT_OF_BLOCKS, 1) X(BAD_ROW, 2) X(BAD_TOKENS, 3) X(NOT_EMPTY, 4) X(EMPTY, 5)
#define PK_SLOT_FIELDS(X)                                                                         \
  X(ACTIVE, 0) X(BASE, 1) X(FIRST, 2) X(EXCLUDE, 3) X(SERIAL, 4) X(CHAIN_ID, 5) X(PROMPT_ID, 6)   \
  X(HORIZON, 7) X(STOP_TOKEN, 8) X(CAN_END_EARLY, 9) X(SEED, 10)
#define PK_SLOT_BOUNDS(X) X(THETA, 0) X(LENGTH_BONUS, 1)
#define PK_SLOT_FLAGS(X) X(REJECTED, 8)
#define PK_TALLY(X) X(OTHERS, 0) X(KEPT, 1) X(REFERENCE, 2) X(MASS, 3)

// NAN and FAULT are macros or repeat, hence the trailing underscore.
#define PK_ENUMERATOR(name, value) name##_ = value,
enum class ChainField : int32_t { PK_CHAIN_FIELDS(PK_ENUMERATOR) };
enum class LaneField : int32_t { PK_LANE_FIELDS(PK_ENUMERATOR) };
enum class Mode : int32_t { PK_MODES(PK_ENUMERATOR) };
enum class LaneStatus : int32_t { PK_LANE_STATUSES(PK_ENUMERATOR) };
enum class Outcome : int8_t { PK_OUTCOMES(PK_ENUMERATOR) };
enum class Cost : int32_t { PK_COSTS(PK_ENUMERATOR) };
enum class Cut : int32_t { PK_CUTS(PK_ENUMERATOR) };
enum class Status : int32_t { PK_STATUSES(PK_ENUMERATOR) };
enum class BlockStatus : int32_t { PK_BLOCK_STATUSES(PK_ENUMERATOR) };
enum class SlotField : int32_t { PK_SLOT_FIELDS(PK_ENUMERATOR) };
enum class SlotBound : int32_t { PK_SLOT_BOUNDS(PK_ENUMERATOR) };
enum class SlotFlag : int64_t { PK_SLOT_FLAGS(PK_ENUMERATOR) };
enum class Tally : int32_t { PK_TALLY(PK_ENUMERATOR) };
#undef PK_ENUMERATOR

// The tensors of ChainState, in the order of the arguments of mh_advance.
#define PK_STATE_TENSORS                                                                                           \
  ",field,token,logq,cumw,cumz,stop_state,outcome,left,forwarded,step_weight,step_logq,cost,lane_field,lane_token" \
  ",lane_logq,lane_cumw,lane_cumz,lane_stop_state,lane_theta,input_id,position,counter,exclude,commit_range,open_range"

// Row pitches. Macros, so that the layout string can spell them.
#define PK_CHAIN_PITCH 16
#define PK_LANE_PITCH 8
#define PK_SLOT_PITCH 12
constexpr int64_t CHAIN_FIELDS = PK_CHAIN_PITCH;
constexpr int64_t LANE_FIELDS = PK_LANE_PITCH;
constexpr int64_t SLOT_FIELDS = PK_SLOT_PITCH;

}  // namespace power_kernels
