/* Any processor, vectors of 16 bytes. */
#include "sweep.h"
#define BYTES 16
#define SWEEP nm_sweep_portable
#include "sweep_isa.h"
