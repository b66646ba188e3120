"""The program that compares mathematical expressions, in a process that can be ended at any moment.

It reads lines [answer, solution] (JSON) from its input and writes 1 or 0 for each, with
Math-Verify. No limit inside a process can interrupt Python while it computes 9**9**9, but the
kernel can: a comparison that takes more than `CPU_SECONDS` of this process's time, or
`MEMORY_BYTES`, ends it without a reply. It is run as a file, so that it starts without the
package's own imports.
"""

import json
import os
import resource
import select
import signal
import sys

CPU_SECONDS = 2.0
MEMORY_BYTES = 4 << 30
READY = "ready"


def main() -> None:
    """Reply until the input ends or the parent process has exited."""
    # Stop signals are for the run to handle; this process ends when its input does.
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(stop, signal.SIG_IGN)
    given = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY_BYTES if given == resource.RLIM_INFINITY else min(MEMORY_BYTES, given)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import logging

    # Math-Verify logs each unreadable text, and a warning that its own timeout (an alarm) is off.
    logging.disable(logging.CRITICAL)
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # Not units=True, which drops units: 12 m would equal 12 cm.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    latex = LatexExtractionConfig(normalization_config=normalization, boxed_match_priority=-1)

    def read(text: str) -> list:
        # The whole answer must be the expression, not a matching part of it.
        return parse(f"${text}$", [latex], fallback_mode="no_fallback", parsing_timeout=None)

    def equal(answer: str, solution: str) -> bool:
        gold = read(solution)
        return bool(gold) and verify(gold, read(answer), timeout_seconds=None)

    requests = open(0, "rb", buffering=0)  # noqa: SIM115 - for as long as this process lives
    replies, parent = sys.stdout, os.getppid()
    replies.write(f"{READY}\n")
    replies.flush()
    # Output of libraries is not a reply.
    sys.stdout = sys.stderr
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    while True:
        # Other children of the parent can hold the pipe open after the parent has ended.
        while not select.select([requests], [], [], 5)[0]:
            if os.getppid() != parent:
                return
        line = requests.readline()
        if not line:
            return
        answer, solution = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            result = equal(answer, solution)
        except MemoryError:
            return
        # Not an expression, or nested too deeply.
        except Exception:
            result = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(f"{int(result)}\n")
        replies.flush()


if __name__ == "__main__":
    main()
