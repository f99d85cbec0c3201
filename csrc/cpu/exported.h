// What the library of CPU kernels exports: all else in it is hidden.
#pragma once

#define FASTRNN_EXPORTED __attribute__((visibility("default")))
