"""Text that wants to be markup, script or invisible."""

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "javascript:document.title='owned'",
    "{{ 7 * 7 }} {% raw %} ${7*7} &lt; &amp;",
    "a\u202eb\u200bc\u2066d\ufeff\u00ad\x00\x1b\u2028\u2029",
    "\ud800 alone \udc00",
    "'\"`\\",
    "e" + "\u0301\u0316" * 30,
]
