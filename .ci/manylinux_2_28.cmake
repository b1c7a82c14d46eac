# CMake toolchain: the machine's own compilers, and a module that loads wherever glibc is 2.28 or newer (manylinux_2_28).
#
# GCC and nvcc compile, as they do in the image in which the release workflow builds. Zig (PyPI package `ziglang`, its
# command `python-zig`) links, because it knows which symbols each version of glibc has. libstdc++ is newer than that of
# such systems and is linked statically; libgcc_s is old enough.
set(CMAKE_CXX_COMPILER g++)
set(CMAKE_INTERPROCEDURAL_OPTIMIZATION OFF)  # Zig does not read GCC's intermediate code

foreach(name IN ITEMS libstdc++.a libgcc.a libgcc_s.so.1)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=${name} OUTPUT_VARIABLE file
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  list(APPEND runtime ${file})
endforeach()
list(JOIN runtime " " runtime)

# What libstdc++ would read from glibc 2.32 or newer to save atomic instructions; 0: there may be threads.
file(WRITE ${CMAKE_BINARY_DIR}/glibc.c "char __libc_single_threaded;\n")
# Nothing of libstdc++ meets that of other modules in the process.
file(WRITE ${CMAKE_BINARY_DIR}/exports.map "{ global: PyInit_*; local: *; };\n")
set(CMAKE_CXX_CREATE_SHARED_MODULE "python-zig cc -target ${CMAKE_HOST_SYSTEM_PROCESSOR}-linux-gnu.2.28 -O2 -shared -Wl,--gc-sections \
-Wl,--version-script=exports.map -o <TARGET> glibc.c <OBJECTS> <LINK_LIBRARIES> ${runtime}")
