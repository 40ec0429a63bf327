"""Does a price on depth make a model write its steps down? A study's runs: the forecast, what was found, the page."""
