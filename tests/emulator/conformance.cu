// The conformance program on a GPU.
#include "conformance.cuh"

int main() { return vitkit::conformance::run(nullptr); }
