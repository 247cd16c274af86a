"""A program that checks itself against stored numbers, and the commands to build it."""

import numpy as np

from .parts import Parts
from .weights import binary_weights, numbers

STEPS = 8  # of the self-test
MAKEFILE = """\
# make             run the self-test
# make sanitize    the same, watched for wrong memory and undefined behaviour
# make size        flash and RAM; for a Cortex-M4, say:
#     make clean size CC=arm-none-eabi-gcc \\
#         MACHINE="-mcpu=cortex-m4 -mthumb -mfpu=fpv4-sp-d16 -mfloat-abi=hard"
CC = cc
MACHINE =
CFLAGS = -O3 -ffp-contract=fast
STRICT = -std=c99 -Wall -Wextra -Wconversion -pedantic
SIZE = $(if $(filter %gcc,$(CC)),$(CC:gcc=size),size)
COMPILE = $(CC) $(STRICT) $(CFLAGS) $(MACHINE)
OBJECTS = {name}.o {constants}

test: {name}_selftest
	./{name}_selftest

{name}_selftest: $(OBJECTS) {name}_selftest.o
	$(COMPILE) $^ -lm -o $@

%.o: %.c {name}.h
	$(COMPILE) -c $< -o $@

sanitize:
	$(COMPILE) -g -fsanitize=address,undefined -fno-sanitize-recover $(OBJECTS:.o=.c) \\
		{name}_selftest.c -lm -o {name}_sanitized
	./{name}_sanitized

size: $(OBJECTS)
	@echo '#include "{name}.h"' > {name}_ram.c
	@echo 'extern {name}_state state; {name}_state state;' >> {name}_ram.c
	@$(COMPILE) -c {name}_ram.c -o {name}_ram.o
	@$(SIZE) {name}.o | awk 'NR == 2 {{ print "flash, code:", $$1, "bytes" }}'
	@{weights}
	@$(SIZE) {name}_ram.o | awk 'NR == 2 {{ print "RAM for each state:", $$3, "bytes" }}'
	@rm {name}_ram.c {name}_ram.o

clean:
	rm -f *.o {name}_selftest {name}_sanitized

.PHONY: test sanitize size clean
"""


def self_test(parts: Parts, name: str, constants: bool) -> str:
    """Print a program that steps through stored inputs and compares with stored outputs."""
    x, y = parts.example(STEPS)
    limit = 1e-5 * max(1.0, float(np.abs(y).max()))
    shape = "" if parts.embeds else f"[{name.upper()}_INPUTS]"
    weights = f"&{name}_constants" if constants else "&weights"
    read = "" if constants else f"""\
    static {name}_weights weights;
    FILE *file = fopen("{name}_weights.bin", "rb");
    const size_t found = file ? fread(&weights, sizeof weights, 1, file) : 0;
    if (file)
        fclose(file);
    if (found != 1 || !{name}_fits(&weights)) {{
        printf("{name}_weights.bin is missing, or another model's\\n");
        return 1;
    }}
"""  # fmt: skip
    return f"""\
/* Steps through stored inputs and prints the largest difference to what float64 gives. */
#include <math.h>
#include <stdio.h>

#include "{name}.h"

enum {{ STEPS = {STEPS} }};

static const {"int32_t" if parts.embeds else "float"} inputs[STEPS]{shape} = {numbers(x)};

static const float outputs[STEPS][{name.upper()}_OUTPUTS] = {numbers(y)};

int main(void)
{{
    static {name}_state state;
    static float y[{name.upper()}_OUTPUTS];
    float largest = 0.0f;
{read}    {name}_reset(&state);
    for (int t = 0; t < STEPS; t++) {{
        if ({name}_step({weights}, &state, inputs[t], y))
            return 1;
        for (int j = 0; j < {name.upper()}_OUTPUTS; j++) {{
            const float d = fabsf(y[j] - outputs[t][j]);
            if (d > largest || d != d)
                largest = d;
        }}
    }}
    printf("largest difference in %d steps: %g (at most {limit:.2g})\\n", STEPS, (double)largest);
    return !(largest <= {limit:.9g}f);
}}
"""


def makefile(parts: Parts, name: str, constants: bool) -> str:
    """Print the commands: test, sanitize, size."""
    bytes_of_file = len(binary_weights(parts))
    weights = (
        f'$(SIZE) {name}_weights.o | awk \'NR == 2 {{ print "flash, weights:", $$1, "bytes" }}\''
        if constants
        else f'echo "{name}_weights.bin: {bytes_of_file} bytes"'
    )
    return MAKEFILE.format(
        name=name, weights=weights, constants=f"{name}_weights.o" if constants else ""
    )
