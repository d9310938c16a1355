"""Comparison of methods on the images of a user (``recontrast compare``).

`methods` lists the methods, `run` trains and measures them, `unlabelled` has the measures that need no labels,
`recommend` chooses one, and `tables`, `gallery` and `page` write the results.
"""
