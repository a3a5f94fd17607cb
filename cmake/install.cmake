# Two components: `base` needs no MLX, `engine` is the rest and the program.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/veloxquant)

# A library, its headers (a folder's, or single ones) and its exported targets, as one component.
function(veloxquant_install component library)
  foreach(header ${ARGN})
    if(IS_DIRECTORY ${PROJECT_SOURCE_DIR}/veloxquant/${header})
      install(DIRECTORY veloxquant/${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/veloxquant COMPONENT ${component}
              FILES_MATCHING PATTERN "*.h" PATTERN "*-inl.h" EXCLUDE)
    else()
      install(FILES veloxquant/${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/veloxquant COMPONENT ${component})
    endif()
  endforeach()
  install(TARGETS ${library} EXPORT ${component} ARCHIVE COMPONENT ${component} INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  install(EXPORT ${component} FILE ${component}.cmake NAMESPACE veloxquant:: DESTINATION ${package_dir} COMPONENT ${component})
endfunction()

veloxquant_install(base veloxquant_base base.h ${base_folders})
if(VELOXQUANT_ENGINE)
  veloxquant_install(engine veloxquant veloxquant.h ${engine_folders})
  install(TARGETS veloxquant_cli RUNTIME COMPONENT engine)
endif()

get_filename_component(openblas_folder ${VELOXQUANT_OPENBLAS} DIRECTORY)
configure_package_config_file(cmake/veloxquantConfig.cmake.in veloxquantConfig.cmake INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may change what the one before promised.
write_basic_package_version_file(veloxquantConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES cmake/openblas.cmake ${PROJECT_BINARY_DIR}/veloxquantConfig.cmake ${PROJECT_BINARY_DIR}/veloxquantConfigVersion.cmake
        DESTINATION ${package_dir} COMPONENT base)
