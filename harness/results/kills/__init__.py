"""The kill matrix: every mutant under the suites, and which property kills which, for the right reason.

`hunting` runs one mutant, `pool` all of them in processes of their own, `reading` takes up what was run
before, `judging` says what it proves, `page` writes it down.
"""
