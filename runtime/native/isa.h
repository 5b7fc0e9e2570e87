/* One instruction set: everything compiled for vectors of V floats, behind one table. */
#include "vector.h"

#include "codes.h"
#include "pack.h"
#include "unpack.h"

#include "shares.h"

#include "panel.h"

#include "lanes.h"

#include "mixed.h"

#include "dots.h"

#include "few.h"

#include "few_dots.h"

#include "limits.h"

/* Which kernel runs a job: the first that fits, the panel if none does. */
typedef struct {
    int (*fits)(const nm_job *);
    int64_t (*tasks)(const nm_job *);
    int64_t (*scratch)(const nm_job *);
    int (*run)(const nm_job *, int64_t, char *);
} kernel;
static int fits_few(const nm_job *j) { return j->few != 0; }
static int fits_all(const nm_job *j) { return j->m > 0; }
static const kernel kernels[] = {
    {fits_few_dots, few_tasks, few_scratch, run_few_dots},
    {fits_dots, dots_tasks, dots_scratch, run_dots},
    {fits_few, few_tasks, few_scratch, run_few},
    {fits_mixed, mixed_tasks, mixed_scratch, run_mixed},
    {fits_lanes, lanes_tasks, lanes_scratch, run_lanes},
    {fits_all, panel_tasks, panel_scratch, run_panel},
};

static const kernel *kernel_of(const nm_job *j) {
    const kernel *k = kernels;
    while (!k->fits(j)) k++;
    return k;
}

static int64_t tasks(const nm_job *j) { return kernel_of(j)->tasks(j); }
static int64_t scratch(const nm_job *j) { return kernel_of(j)->scratch(j); }
static int run(const nm_job *j, int64_t task, char *room) { return kernel_of(j)->run(j, task, room); }

const nm_isa TABLE = {NAME, tasks, scratch, run, multiply_adds, read_all};
