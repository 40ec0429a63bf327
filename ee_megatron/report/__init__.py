"""The report of runs: charts, tables and answers on one page. Reads run directories; knows nothing of models."""
