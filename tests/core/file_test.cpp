#include "veloxquant/core/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <utility>

#include "tests/temporary_folder.h"

namespace veloxquant {
namespace {

using testing::get;
using ::testing::HasSubstr;
using testing::message_of;
using testing::put;

class File : public ::testing::Test {
 protected:
  std::size_t files() const {
    return static_cast<std::size_t>(
        std::distance(std::filesystem::directory_iterator(folder.path()), std::filesystem::directory_iterator()));
  }

  testing::TemporaryFolder folder;
};

TEST_F(File, ReadsWhole) {
  const std::string contents("a\0b\n", 4);
  put(folder / "x", contents);
  EXPECT_EQ(read_file(folder / "x"), contents);
  put(folder / "empty", "");
  EXPECT_EQ(read_file(folder / "empty"), "");
}

TEST_F(File, NamesWhatCannotBeRead) {
  put(folder / "x", "1234");
  EXPECT_THAT(message_of<std::runtime_error>([&] { read_file(folder / "none"); }), HasSubstr("none"));
  EXPECT_THAT(message_of<std::runtime_error>([&] { read_file(folder.path()); }), HasSubstr("not a regular file"));
  EXPECT_THAT(message_of<std::runtime_error>([&] { read_file(folder / "x", 3); }), HasSubstr("at most 3"));
  EXPECT_EQ(read_file(folder / "x", 4), "1234");
  EXPECT_THAT(message_of<std::runtime_error>([&] { MappedFile(folder / "none"); }), HasSubstr("none"));
  EXPECT_THAT(message_of<std::runtime_error>([&] { MappedFile(folder.path()); }), HasSubstr("not a regular file"));
}

// A pipe without a writer would keep a reader waiting for ever.
TEST_F(File, DoesNotWaitForPipes) {
  const auto pipe = folder / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THAT(message_of<std::runtime_error>([&] { read_file(pipe); }), HasSubstr("not a regular file"));
  EXPECT_THAT(message_of<std::runtime_error>([&] { MappedFile mapped(pipe); }), HasSubstr("not a regular file"));
}

TEST_F(File, WritesWholeOrNotAtAll) {
  write_file_atomically(folder / "x", "old");
  write_file_atomically(folder / "x", "new");
  EXPECT_EQ(get(folder / "x"), "new");
  EXPECT_EQ(files(), 1u);
  const auto permissions = std::filesystem::status(folder / "x").permissions();
  EXPECT_NE(permissions & std::filesystem::perms::owner_write, std::filesystem::perms::none);

  EXPECT_THAT(message_of<std::runtime_error>([&] { write_file_atomically(folder / "none" / "x", "x"); }), HasSubstr("none/x"));
  EXPECT_THAT(message_of<std::runtime_error>([&] { write_file_atomically(folder.path(), "x"); }), HasSubstr("is a folder"));
  EXPECT_EQ(files(), 1u);
}

TEST_F(File, KeepsSpecialFiles) {
  const auto pipe = folder / "pipe", link = folder / "link";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  std::filesystem::create_symlink("pipe", link);
  for (const auto& path : {pipe, link, std::filesystem::path("/dev/null")}) {
    EXPECT_THAT(message_of<std::runtime_error>([&] { check_writable(path); }), HasSubstr(path.string()));
    EXPECT_THAT(message_of<std::runtime_error>([&] { write_file_atomically(path, "x"); }), HasSubstr("expected a regular file"));
  }
  EXPECT_TRUE(std::filesystem::is_fifo(pipe));
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
}

TEST_F(File, FollowsLinks) {
  std::filesystem::create_directory(folder / "far");
  put(folder / "far" / "old", "old");
  std::filesystem::create_symlink("far/old", folder / "direct");
  std::filesystem::create_symlink(folder / "direct", folder / "twice");
  std::filesystem::create_symlink("far/new", folder / "dangling");
  write_file_atomically(folder / "twice", "1");
  EXPECT_EQ(get(folder / "far" / "old"), "1");
  write_file_atomically(folder / "dangling", "2");
  EXPECT_EQ(get(folder / "far" / "new"), "2");
  for (const char* link : {"direct", "twice", "dangling"}) EXPECT_TRUE(std::filesystem::is_symlink(folder / link)) << link;
  std::filesystem::create_symlink("circle", folder / "circle");
  EXPECT_THAT(message_of<std::runtime_error>([&] { write_file_atomically(folder / "circle", "x"); }), HasSubstr("circle"));
}

TEST_F(File, NeedsAName) {
  for (const char* path : {"", "none/"})
    EXPECT_THAT(message_of<std::runtime_error>([&] { check_writable(path); }), HasSubstr("expected the name of a file")) << path;
}

TEST_F(File, ChecksBeforehandWithoutATrace) {
  put(folder / "x", "old");
  check_writable(folder / "x");
  check_writable(folder / "y");
  EXPECT_EQ(files(), 1u);
  EXPECT_EQ(get(folder / "x"), "old");
  EXPECT_THROW(check_writable(folder / "none" / "x"), std::runtime_error);
  EXPECT_THROW(check_writable(folder.path()), std::runtime_error);
}

TEST_F(File, MapsAndMoves) {
  put(folder / "x", "12345");
  MappedFile first(folder / "x");
  const MappedFile second(std::move(first));
  ASSERT_EQ(second.bytes().size(), 5u);
  EXPECT_EQ(static_cast<char>(second.bytes()[4]), '5');
  put(folder / "empty", "");
  EXPECT_TRUE(MappedFile(folder / "empty").bytes().empty());
}

}  // namespace
}  // namespace veloxquant
