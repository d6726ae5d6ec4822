"""What `light bench` measures with. Imported by the commands in `light_core.cli` alone; nothing that serves needs it.

workloads   named request mixes and free ones      offline     rounds of the offline API
serving     runs against a server, their metrics   client      the HTTP client that they load it with
step        one engine step, line by line          counting    bytes and flops that a step cannot do without
ceilings    what the machine can do                kernels     where the device's time goes
plots       PNG files                              report      tables of results and JSON
budget_table  a step on the terminal
"""
