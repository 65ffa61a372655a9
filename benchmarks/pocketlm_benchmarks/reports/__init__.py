"""A result for people and for other programs: terminal, Markdown, HTML, CSV.

`layout` holds what a section and a table are, `speed`, `costs` and `setting` say what stands in them,
`sections` puts them in order; the four writers only render. `plots` draws for the HTML page.
"""
