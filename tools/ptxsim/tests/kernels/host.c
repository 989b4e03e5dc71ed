// SPDX-License-Identifier: BSD-3-Clause
/* Host code that allocates by itself: y = 6 x by way of scratch memory. `fault` plants one. */
#include <stdlib.h>

int launch_scale(const float* x, float* y, int n, float factor, void* stream);
void ptxsim_note_memory(const void* data, long long bytes, int kind);
void ptxsim_note_call(int begins);

enum { INPUT, OUTPUT, SCRATCH, FILLED };
enum { NONE, UNKNOWN_INPUT, SHORT_OUTPUT, UNWRITTEN_SCRATCH, FILLED_TAIL };

int six_times(const float* x, float* y, int n, int fault, void* stream) {
  float* scratch = malloc(n * sizeof(float));
  int status = 0, half = n / 2;
  ptxsim_note_call(1);
  if (fault != UNKNOWN_INPUT) {
    ptxsim_note_memory(x, half * sizeof(float), INPUT); /* two views of one array */
    ptxsim_note_memory(x + half - 1, (n - half + 1) * sizeof(float), INPUT);
  }
  ptxsim_note_memory(y, n * sizeof(float), OUTPUT);
  ptxsim_note_memory(scratch, n * sizeof(float), SCRATCH);
  if (fault == FILLED_TAIL) {
    y[n - 1] = 6;
    ptxsim_note_memory(y + n - 1, sizeof(float), FILLED);
  }
  status = launch_scale(x, scratch, fault == UNWRITTEN_SCRATCH ? half : n, 2, stream);
  if (!status) status = launch_scale(scratch, y, n - (fault == SHORT_OUTPUT || fault == FILLED_TAIL), 3, stream);
  ptxsim_note_call(0);
  free(scratch);
  return status;
}
