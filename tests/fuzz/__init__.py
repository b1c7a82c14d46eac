"""A differential fuzzer: random calls of every public function against float64 formulas, values and gradients.

    python -m tests.fuzz --cases 5000 --seed 3 --backend cpu       # from the root of a checkout
    pytest tests/fuzz --fuzz-cases 5000 --fuzz-seed 3 --fuzz-backend cpu

A case is a small dict of plain values; a key that is missing has its default, so any subset of a case is a case. That
is how a failing case shrinks, and how the one line repeats it that is printed: `python -m tests.fuzz --case '{...}'`.

- `generate`: seed and number -> case.
- `tensors`: case -> tensors, in every memory layout.
- `formulas`: preference losses in float64, with the error that fp32 arithmetic may have.
- `setup`, `rows`, `losses`, `heads`: what a case says; truth and allowed errors of rows, of a loss, and past a head.
- `calls`: one case of each public function, run and compared.
- `wrong_calls`: malformed arguments, which have to raise an error that names them.
- `engine`: runs cases, shrinks those that fail.
"""
