"""How tests have programs compiled."""

# Tests spend their time on compiling programs that then run for milliseconds. Code that LLVM does not optimise, made in one
# piece and by XLA's older emitters of fused loops rather than through MLIR, computes the same and is compiled in a sixth of the
# time. The demo and the benchmark run optimised code. libtpu does not know these flags: what compiles for TPUs runs without them.
FAST = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
