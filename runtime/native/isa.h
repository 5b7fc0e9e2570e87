/* One instruction set: everything compiled for vectors of V floats, behind one table. */
#include "vector.h"

#include "codes.h"
#include "pack.h"
#include "unpack.h"

#include "shares.h"

#include "panel.h"

#include "lanes.h"

#include "few.h"

#include "limits.h"

static int64_t tasks(const nm_job *j) { return j->few ? few_tasks(j) : fits_lanes(j) ? lanes_tasks(j) : panel_tasks(j); }
static int64_t scratch(const nm_job *j) { return j->few ? 64 : fits_lanes(j) ? lanes_scratch(j) : panel_scratch(j); }
static int run(const nm_job *j, int64_t task, char *room) {
    return j->few ? run_few(j, task) : fits_lanes(j) ? run_lanes(j, task, room) : run_panel(j, task, room);
}

const nm_isa TABLE = {NAME, tasks, scratch, run, multiply_adds, read_all};
