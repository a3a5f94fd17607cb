# llama.cpp's Jinja engine (MIT), for chat templates.  No package has it alone: it is taken out of a source package on PyPI that
# carries llama.cpp.  VELOXQUANT_JINJA is the folder where it is; to those of our own it is fetched.
# As a script (`cmake -P`, by setup.sh) it fetches to where the build looks for it first.
set(jinja_url https://files.pythonhosted.org/packages/87/62/b6dfaaf346d3d4fd0e2a2df755f2693b77673f2735da7ba0592af9d2f09e/xllamacpp-2026.10.11549.tar.gz)
set(jinja_sha256 c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b)
set(jinja_shared ${CMAKE_CURRENT_LIST_DIR}/../.venv/jinja)

function(veloxquant_fetch_jinja folder)
  if(EXISTS ${folder}/${jinja_sha256})
    return()
  endif()
  set(made ${folder}.fetched)
  file(REMOVE_RECURSE ${made})
  message(STATUS "Fetching llama.cpp's Jinja engine (38 MB, once)")
  file(DOWNLOAD ${jinja_url} ${made}/archive.tar.gz STATUS status TIMEOUT 600)
  list(POP_FRONT status failed)
  if(failed)
    message(FATAL_ERROR "${jinja_url}: ${status}.  Where there is no network, copy the folder ${folder} from a build that has it, "
                        "and name it by -DVELOXQUANT_JINJA=FOLDER")
  endif()
  file(SHA256 ${made}/archive.tar.gz found)
  if(NOT found STREQUAL jinja_sha256)
    message(FATAL_ERROR "${jinja_url}: expected SHA-256 ${jinja_sha256}, got ${found}")
  endif()
  file(ARCHIVE_EXTRACT INPUT ${made}/archive.tar.gz DESTINATION ${made}
       PATTERNS */llama.cpp/common/jinja/* */llama.cpp/common/unicode.* */thirdparty/llama.cpp/LICENSE)
  file(GLOB source ${made}/xllamacpp-*/thirdparty/llama.cpp)
  file(GLOB capabilities ${source}/common/jinja/caps.*)  # looks for what templates can, and needs more of llama.cpp
  file(REMOVE ${capabilities})
  file(COPY ${source}/common/ ${source}/LICENSE DESTINATION ${made}/whole)
  # The JSON library is ours.
  file(WRITE ${made}/whole/json.h "#pragma once\n#include <nlohmann/json.hpp>\nusing common_json = nlohmann::ordered_json;\n")
  file(WRITE ${made}/whole/${jinja_sha256} "")
  file(REMOVE_RECURSE ${folder})
  file(RENAME ${made}/whole ${folder})
  file(REMOVE_RECURSE ${made})
endfunction()

if(CMAKE_SCRIPT_MODE_FILE)
  veloxquant_fetch_jinja(${jinja_shared})
  return()
endif()

set(jinja_built ${PROJECT_BINARY_DIR}/jinja)
set(jinja_default ${jinja_built})
if(EXISTS ${jinja_shared}/${jinja_sha256})
  set(jinja_default ${jinja_shared})
endif()
set(VELOXQUANT_JINJA ${jinja_default} CACHE PATH "Folder of llama.cpp's Jinja engine")
if(VELOXQUANT_JINJA STREQUAL jinja_built OR VELOXQUANT_JINJA STREQUAL jinja_shared)
  veloxquant_fetch_jinja(${VELOXQUANT_JINJA})
elseif(NOT EXISTS ${VELOXQUANT_JINJA}/${jinja_sha256})
  message(FATAL_ERROR "VELOXQUANT_JINJA: ${VELOXQUANT_JINJA} is not a folder that cmake/jinja.cmake made: it has no file "
                      "${jinja_sha256}")
endif()

# Objects, so that they are in our library and nobody who links it has to know.
file(GLOB jinja_sources ${VELOXQUANT_JINJA}/jinja/*.cpp ${VELOXQUANT_JINJA}/unicode.cpp)
add_library(veloxquant_jinja OBJECT ${jinja_sources})
target_include_directories(veloxquant_jinja SYSTEM PUBLIC ${VELOXQUANT_JINJA})
target_compile_options(veloxquant_jinja PRIVATE -w)
target_link_libraries(veloxquant_jinja PUBLIC nlohmann_json::nlohmann_json)
