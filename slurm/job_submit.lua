-- Refuses --sshd=yes for jobs whose nodes other jobs may share, when they are submitted and not when they start.
-- In slurm.conf: JobSubmitPlugins=lua; this file is job_submit.lua beside it, or its one condition a part of the site's own.

-- Partitions whose nodes are exclusive by themselves (OverSubscribe=EXCLUSIVE): a job does not show that at submission.
local EXCLUSIVE = {}

function slurm_job_submit(job, partitions, uid)
   local wants = false
   for _, item in pairs(job.spank_job_env or {}) do
      wants = wants or item == "SHIFTER_SSHD=yes"
   end
   if wants and job.shared ~= 0 and not EXCLUSIVE[job.partition or ""] then
      slurm.log_user("--sshd=yes needs nodes of one's own: add --exclusive, or leave it at --sshd=auto")
      return slurm.ERROR
   end
   return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, uid)
   return slurm.SUCCESS
end

return slurm.SUCCESS
