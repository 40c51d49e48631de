"""`vllm-ext quality`: what a plan costs, beside the stock model: what it retrieves, prose, capitals and sums.

Perplexity alone misleads: *Attend First, Consolidate Later* (arXiv 2409.03621) finds that lower layers gather and upper
ones do not, and a plan that leaves out the wrong ones hardly changes perplexity but loses the tasks that retrieve from
the prompt. So both are measured, in the real engine, one model after another, each in a process of its own that gives
its memory back when it ends.
"""
