"""nbgrader's settings for a course with these labs; copy it into the course folder (see CONTRIBUTING.md)."""
c = get_config()  # noqa: F821 (nbgrader defines it)

c.CourseDirectory.course_id = "darkdistill"
# Seconds a cell may run; nbgrader's own 30 are less than a training on a busy laptop takes.
c.ExecutePreprocessor.timeout = 600
# What a student finds in place of a solution; tools/make_labs.py reads it here.
c.ClearSolutions.code_stub = {"python": 'raise NotImplementedError("write your solution here")'}
