// GCC 11 and newer call this function where the size of a std::vector overflows. The C++ libraries of the systems that
// the wheels must run on are older and have not got it, so it is here: it does what theirs do.
#include <new>

#ifdef __GLIBCXX__
namespace std {
[[noreturn]] void __throw_bad_alloc();
[[noreturn, gnu::visibility("hidden")]] void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { __throw_bad_alloc(); }
} // namespace std
#endif
