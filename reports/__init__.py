"""Reports: pages, figures and tables that people look at."""
