/* One instruction set: all sweeps, compiled for vectors of BYTES bytes. */
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("O3,fp-contract=off") /* loops become vectors; a product and a sum are two roundings, as in torch */
#endif

#define JOINED(a, b) a##b
#define JOIN(a, b) JOINED(a, b)

#include "live.h"
#include "planes.h"
#include "marks.h"
#include "beside.h"
#include "places.h"
#include "keys.h"

#define REAL float
#define NAMED(name) JOIN(name, _float)
#include "under_mask.h"
#include "retire.h"
#undef REAL
#undef NAMED
#define REAL double
#define NAMED(name) JOIN(name, _double)
#include "under_mask.h"
#include "retire.h"
#undef REAL
#undef NAMED

#include "exchange.h"
#if BYTES >= 32
#include "max_sums.h"
#endif

#define BITS 16
#include "keep.h"
#include "largest.h"
#undef BITS
#define BITS 32
#include "keep.h"
#include "largest.h"
#undef BITS
#define BITS 64
#include "keep.h"
#include "largest.h"
#undef BITS

void SWEEP(const nm_sweep *s, int64_t first, int64_t last) {
    const int wide = s->item == 8;
    switch (s->kind) {
    case NM_KEEP: (s->item == 2 ? keep_16 : wide ? keep_64 : keep_32)(s, first, last); break;
    case NM_GRADIENTS: (wide ? gradients_double : gradients_float)(s, first, last); break;
    case NM_DECAY: (wide ? decay_double : decay_float)(s, first, last); break;
    case NM_COVER: cover(s, first, last); break;
    case NM_COVERED: (s->item == 2 ? covered_16 : wide ? covered_64 : covered_32)(s, first, last); break;
    case NM_RETIRE: (wide ? retire_double : retire_float)(s, first, last); break;
#if BYTES >= 32
    case NM_MAX_SUMS: max_sums(s, first, last); break;
#endif
    default: (s->item == 2 ? largest_16 : wide ? largest_64 : largest_32)(s, first, last);
    }
}
