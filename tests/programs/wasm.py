"""WebAssembly under wasmtime: python3 wasm.py PACKAGES PROFILER OPTIMISATION, without end."""

import sys

packages, profiler, optimisation = sys.argv[1:]
sys.path.insert(0, packages)

import wasmtime  # noqa: E402

# `down` calls itself; at the bottom are calls within the module, calls that the runtime serves, and a function of Python.
MODULE = """
(module
  (import "host" "tick" (func $tick (param i32) (result i32)))
  (memory 1 1)
  (func $leaf (param i32) (result i32)
    (i32.add (local.get 0) (i32.const 1)))
  (func $calls (param i32) (result i32) (local $i i32)
    (loop $again
      (local.set 0 (call $leaf (local.get 0)))
      (br_if $again (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 20000))))
    (local.get 0))
  (func $fills (param i32) (result i32) (local $i i32)
    (loop $again
      (memory.fill (i32.const 0) (local.get $i) (i32.const 1000))
      (drop (memory.grow (i32.const 0)))
      (br_if $again (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 500))))
    (local.get 0))
  (func $bottom (param i32) (result i32)
    (call $tick (call $fills (call $calls (local.get 0)))))
  (func $down (param i32) (result i32)
    (if (result i32) (local.get 0)
      (then (i32.add (call $down (i32.sub (local.get 0) (i32.const 1))) (i32.const 1)))
      (else (call $bottom (i32.const 1)))))
  (func $run (export "run") (param i32) (result i32)
    (i32.add (call $down (local.get 0)) (i32.const 1))))
"""
# The test counts them.
DEPTH = 20


def tick(number):
    return number + sum(range(1000))


config = wasmtime.Config()
config.profiler = profiler
config.cranelift_opt_level = optimisation
store = wasmtime.Store(wasmtime.Engine(config))
number = wasmtime.ValType.i32()
host = wasmtime.Func(store, wasmtime.FuncType([number], [number]), tick)
instance = wasmtime.Instance(store, wasmtime.Module(store.engine, MODULE), [host])
run = instance.exports(store)["run"]
while True:
    run(store, DEPTH)
