"""Everything that needs a GPU, ordered by worth, within a budget of seconds, and continued by a second call.

    step.py        what a step sees of the run, and how it tells what it measured
    commands.py    commands that steps run
    steps/         the steps: correctness, figures, peers, profiles, tuning
    schedule.py    the table of steps in order of worth, and which of them a call runs
    worker.py      steps in a process of their own, one after the other, each under a time limit
    machine.py     the machine that figures belong to, and why nothing can run on it
    record.py      what was measured so far, on disk after every step
    wheels.py      peers out of a folder of wheels
    __main__.py    the command line

To add a step, write a function `(Bench) -> list[str]` in `steps/` and enter it in `schedule.STEPS`: what it measures
goes to `bench.add`, and the lines that it returns are printed under its name.
"""
