"""The playground: one page that scores text by hand and shows what the monitoring has seen."""
