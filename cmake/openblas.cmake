# OpenBLAS as the target veloxquant::openblas: that of the Python package scipy-openblas32, which knows today's processors on every
# distribution alike, or else the system's.  Installed as well, since a program that links the library needs the same.
set(VELOXQUANT_OPENBLAS_PACKAGE scipy-openblas32)

# Where a Python has the package; empty if it has not.
function(veloxquant_openblas_of_python python result)
  execute_process(COMMAND ${python} -c "import importlib.util as u; print(u.find_spec('scipy_openblas32').submodule_search_locations[0])"
                  OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()

# names: scipy_openblas (whose symbols have the prefix scipy_) and openblas, in order.  OPENBLAS_ROOT, a variable or of the environment,
# is the only place if it is there; otherwise the folders that follow, python3's package, and the system.  Leaves VELOXQUANT_OPENBLAS, the library,
# and without one VELOXQUANT_OPENBLAS_MISSING, what to do.
function(veloxquant_find_openblas names)
  if(NOT OPENBLAS_ROOT)
    set(OPENBLAS_ROOT "$ENV{OPENBLAS_ROOT}")
  endif()
  if(VELOXQUANT_OPENBLAS AND NOT EXISTS "${VELOXQUANT_OPENBLAS}")  # of an environment that is gone
    unset(VELOXQUANT_OPENBLAS CACHE)
  endif()
  if(OPENBLAS_ROOT)
    unset(VELOXQUANT_OPENBLAS CACHE)
    find_library(VELOXQUANT_OPENBLAS NAMES ${names} PATHS ${OPENBLAS_ROOT} PATH_SUFFIXES lib lib64 lib/${CMAKE_LIBRARY_ARCHITECTURE} NO_DEFAULT_PATH)
  elseif(NOT VELOXQUANT_OPENBLAS)
    find_program(python python3 NO_CACHE)
    if(python)
      veloxquant_openblas_of_python(${python} of_python)
    endif()
    find_library(VELOXQUANT_OPENBLAS NAMES ${names} HINTS ${ARGN} ${of_python} PATH_SUFFIXES lib)
  endif()
  if(VELOXQUANT_OPENBLAS)
    message(STATUS "OpenBLAS: ${VELOXQUANT_OPENBLAS}")
    add_library(veloxquant::openblas SHARED IMPORTED GLOBAL)
    set_target_properties(veloxquant::openblas PROPERTIES IMPORTED_LOCATION ${VELOXQUANT_OPENBLAS})
    return()
  endif()
  list(JOIN names " or lib" names)
  set(missing "OpenBLAS (lib${names}): `pip install ${VELOXQUANT_OPENBLAS_PACKAGE}` for the Python of -DPython_EXECUTABLE, or name its folder by -DOPENBLAS_ROOT")
  if(OPENBLAS_ROOT)
    string(PREPEND missing "in OPENBLAS_ROOT, ${OPENBLAS_ROOT}: ")
  endif()
  set(VELOXQUANT_OPENBLAS_MISSING "${missing}" PARENT_SCOPE)
endfunction()
