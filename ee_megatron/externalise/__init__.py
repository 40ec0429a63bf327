"""Does a depth penalty make a model write out its reasoning? A study's runs as one data frame, its effects and page."""
