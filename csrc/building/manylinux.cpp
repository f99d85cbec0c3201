// Linked into the libraries of a wheel, so that they load where glibc is 2.28 and libstdc++ that of
// GCC 8, whatever the machine that the wheel is built on. Newer ones added some symbols and gave
// others a new version; here are the former, and the latter by their old version.
#include <dlfcn.h>
#include <pthread.h>

#include <new>

#if defined(__x86_64__)
#define FASTRNN_OLD(name) __asm__(".symver old_" #name "," #name "@GLIBC_2.2.5")
#elif defined(__aarch64__)
#define FASTRNN_OLD(name) __asm__(".symver old_" #name "," #name "@GLIBC_2.17")
#else
#error "manylinux wheels are for x86-64 and aarch64"
#endif

extern "C" {

// False: libstdc++ then counts references by atomic operations.
extern char __libc_single_threaded;
char __libc_single_threaded = 0;

void* old_dlopen(const char*, int);
void* old_dlsym(void*, const char*);
int old_dlclose(void*);
char* old_dlerror();
int old_pthread_mutex_trylock(pthread_mutex_t*);
int old_pthread_once(pthread_once_t*, void (*)());
int old_pthread_rwlock_rdlock(pthread_rwlock_t*);
int old_pthread_rwlock_wrlock(pthread_rwlock_t*);
int old_pthread_rwlock_unlock(pthread_rwlock_t*);
FASTRNN_OLD(dlopen);
FASTRNN_OLD(dlsym);
FASTRNN_OLD(dlclose);
FASTRNN_OLD(dlerror);
FASTRNN_OLD(pthread_mutex_trylock);
FASTRNN_OLD(pthread_once);
FASTRNN_OLD(pthread_rwlock_rdlock);
FASTRNN_OLD(pthread_rwlock_wrlock);
FASTRNN_OLD(pthread_rwlock_unlock);

void* dlopen(const char* path, int mode) { return old_dlopen(path, mode); }
void* dlsym(void* library, const char* name) { return old_dlsym(library, name); }
int dlclose(void* library) { return old_dlclose(library); }
char* dlerror() { return old_dlerror(); }
int pthread_mutex_trylock(pthread_mutex_t* mutex) { return old_pthread_mutex_trylock(mutex); }
int pthread_once(pthread_once_t* once, void (*run)()) { return old_pthread_once(once, run); }
int pthread_rwlock_rdlock(pthread_rwlock_t* lock) { return old_pthread_rwlock_rdlock(lock); }
int pthread_rwlock_wrlock(pthread_rwlock_t* lock) { return old_pthread_rwlock_wrlock(lock); }
int pthread_rwlock_unlock(pthread_rwlock_t* lock) { return old_pthread_rwlock_unlock(lock); }

}  // extern "C"

namespace std {

void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

}  // namespace std
