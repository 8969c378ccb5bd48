# sdq.h: see README.md. Everything is built into build/.
CC ?= cc
CXX ?= c++
CFLAGS ?= -O2
WARN = -Wall -Wextra -pedantic -Wconversion -Wsign-conversion -Wshadow -Wundef
OPENMP := $(shell echo "int main(void){return 0;}" | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)

all: build/sdq ## the command line tool (default)

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

build/sdq: tools/sdq.c tools/clip_vocab.inc tools/sdq_bench.h tools/sdq_eval.h tools/sdq_study.h sdq.h
	@mkdir -p build
	$(CC) -std=c99 $(WARN) -Wstrict-prototypes $(CFLAGS) $(OPENMP) -I. tools/sdq.c -o $@ -lm

build/random_sd: tools/random_sd.c tools/clip_vocab.inc sdq.h
	@mkdir -p build
	$(CC) -std=c99 $(WARN) -Wstrict-prototypes $(CFLAGS) tools/random_sd.c -o $@ -lm

test: build/sdq ## every test, with gcc and, where installed, clang; C99, C++11, sanitizers
	@CC="$(CC)" CXX="$(CXX)" sh tests/run.sh

demo: build/sdq ## the whole chain on the small model, in at most 5 minutes: build/demo/
	sh tools/demo.sh

eval: build/sdq ## the table of the README in earnest (resumable, up to 3 hours): build/eval/
	sh tools/eval.sh

bench: build/sdq ## speed against the measured peak
	build/sdq bench --model examples/emoji/model

lint: ## the shape of sdq.h: contents, names, layers, lengths (Python)
	python3 tools/lint.py

FUZZ_CC ?= $(shell command -v clang || echo $(CC))
fuzz: ## damaged files for a minute; SECONDS=600 SEED=2 for more
	@mkdir -p build/tests
	$(FUZZ_CC) -std=gnu99 -g -O1 -DSDQ_NO_SIMD -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	    -I. tests/fuzz.c -o build/fuzz -lm
	build/fuzz $(or $(SECONDS),60) $(or $(SEED),1)

mutations: ## break sdq.h in 22 places: are the tests awake? (minutes)
	@CC="$(CC)" sh tests/mutations.sh

golden: ## make the golden files again (Python; versions in tests/golden/manifest.json)
	python3 tools/golden.py

clean: ## remove what was built, not what was trained
	rm -rf build/sdq build/fuzz build/tests build/demo build/mutations

.PHONY: all help test demo eval bench lint fuzz mutations golden clean
