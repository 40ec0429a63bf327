"""The report of runs: charts, tables and answers on one page, from the files that the stages left.

`results.Results` is results.json: the evaluation writes it, the report reads it.
"""
