/* Other processors with vectors of 4 floats and 32 registers, as 64-bit ARM has. */
#include "job.h"
#define V 4
#define MOST 7
#define BLOCK 64
#define MOST_THIN 7
#define BLOCK_THIN 128
#define MOST_TOKENS 4
#define MOST_TOKENS_LOG 2
#define TABLE nm_portable
#define NAME "portable"
#include "isa.h"
