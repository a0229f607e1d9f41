"""The operators: schema, fake, autograd rule and backend table, one file per operator.

What training, distillation, pool, search and latency reach:

- the Pearson loss: ``pearson``, ``pearson_loss`` and what they import;
- the elastic convolution: ``elastic_conv``, ``active_channels``, ``kernel_size``, ``onednn_workaround``.

``pearson_single``, the single pass of the loss, and the Triton kernels of the convolution, ``elastic_pointwise`` and
``elastic_implicit_gemm``, run on request or where `jdkd tune` found them faster.

What :mod:`jdkd.functional` and :mod:`jdkd.experimental` alone reach: ``elastic_levels``, all levels of a pyramid at
once; ``elastic_conv_traced``, the convolution under ``compile_elastic``; ``pack``, the weights of a subnet in one
launch.
"""
