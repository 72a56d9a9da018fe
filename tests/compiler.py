"""How tests have programs compiled."""

# Tests spend their time on compiling programs that then run for milliseconds. Code that LLVM does not optimise computes the same
# and is compiled in two thirds of the time. The demo and the benchmark run optimised code.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
